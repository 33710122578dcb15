// Permutations of vfl.draws.

#include "splitmix.h"

#include <algorithm>
#include <vector>

constexpr int64_t FEW = 128;            // to count how many are smaller is faster than to sort so many
constexpr int PLACE = 24;               // digits for a place in a pass
constexpr uint64_t HASH = (1ull << 40) - 1;

// Slot j of a row of `slots` is example j mod n of pass j div n, each pass in the order of its hashes. out [rows, slots].
extern "C" void shuffled(const int64_t* keys, const int64_t* sizes, int64_t* out, int64_t rows, int64_t slots) {
  std::vector<uint64_t> words(slots);
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t from = 0, n; from < slots; from += n, out += n) {
      n = std::min(sizes[r], slots - from);
      for (int64_t i = 0; i < n; i++) {
        words[i] = (uint64_t(splitmix::bits(keys[r], from + i)) & HASH) << PLACE | uint64_t(i);
      }
      if (n <= FEW) {
        for (int64_t i = 0; i < n; i++) {
          int64_t smaller = 0;
          for (int64_t j = 0; j < n; j++) smaller += words[j] < words[i];
          out[smaller] = i;
        }
      } else {
        std::sort(words.begin(), words.begin() + n);
        for (int64_t i = 0; i < n; i++) out[i] = words[i] & ((1 << PLACE) - 1);
      }
    }
  }
}
