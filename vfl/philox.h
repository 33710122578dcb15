// Philox4x64 with ten rounds (Salmon et al. 2011, doi 10.1145/2063384.2063405): the stream of numpy's Philox(key=key).

#include <algorithm>
#include <cstdint>

namespace philox {

constexpr int64_t BLOCKS = 64;  // made at once, to stay in the nearest cache
constexpr int64_t HALVES = 8;   // 32-bit numbers a block

// BLOCKS blocks from this one on, the stream's first being 1.
inline void blocks(uint64_t key, uint64_t first, uint32_t* out) {
  for (int64_t b = 0; b < BLOCKS; b++, out += HALVES) {
    uint64_t x[4] = {first + b, 0, 0, 0}, k[2] = {key, 0};
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
      auto p = (unsigned __int128)0xD2E7470EE14C6C93 * x[0], q = (unsigned __int128)0xCA5A826395121157 * x[2];
      x[0] = uint64_t(q >> 64) ^ x[1] ^ k[0];
      x[1] = uint64_t(q);
      x[2] = uint64_t(p >> 64) ^ x[3] ^ k[1];
      x[3] = uint64_t(p);
      k[0] += 0x9E3779B97F4A7C15;
      k[1] += 0xBB67AE8584CAA73B;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      out[2 * i] = uint32_t(x[i]);
      out[2 * i + 1] = uint32_t(x[i] >> 32);
    }
  }
}

// f(i, u) for n floats u uniform on [0, 1), as numpy's Generator draws them.
template <class F>
inline void uniform(uint64_t key, int64_t n, F f) {
  uint32_t numbers[BLOCKS * HALVES];
  for (int64_t from = 0; from < n; from += BLOCKS * HALVES) {
    blocks(key, 1 + from / HALVES, numbers);
    int64_t count = std::min(n - from, BLOCKS * HALVES);
    for (int64_t i = 0; i < count; i++) f(from + i, float(int32_t(numbers[i] >> 8)) * 0x1p-24f);
  }
}

}  // namespace philox
