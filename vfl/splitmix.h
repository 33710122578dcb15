// SplitMix64 (Steele, Lea & Flood 2014, doi 10.1145/2660193.2660195), as vfl.random.

#include <cstdint>

namespace splitmix {

inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

// Number i of a key's, from 0, of vfl.random.bits.
inline int64_t bits(int64_t key, int64_t i) { return int64_t(mix(uint64_t(key) + 0x9E3779B97F4A7C15 * uint64_t(i + 1))); }

}  // namespace splitmix
