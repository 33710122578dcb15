// Draws of vfl.random from Philox streams, a row for each key.

#include "philox.h"

#include <cstring>

extern "C" void uniform(const int64_t* keys, float* out, int64_t rows, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) {
    float* y = out + r * n;
    philox::uniform(keys[r], n, [=](int64_t i, float u) { y[i] = u; });
  }
}

// Which of n coins of 16 bits are below a bound: 1, else 0.
extern "C" void toss(int64_t key, int64_t below, uint8_t* out, int64_t n) {
  constexpr int64_t COINS = 2 * philox::BLOCKS * philox::HALVES;
  uint32_t numbers[COINS / 2];
  uint16_t coins[COINS];
  for (int64_t from = 0; from < n; from += COINS) {
    philox::blocks(key, 1 + from / (2 * philox::HALVES), numbers);
    std::memcpy(coins, numbers, sizeof coins);
    int64_t count = std::min(n - from, COINS);
    for (int64_t i = 0; i < count; i++) out[from + i] = coins[i] < below;
  }
}

// Of the entries of a row of zeros and ones that are `is`, those of these ranks [m], which ascend, become the other.
extern "C" void flip(uint8_t* row, int64_t n, const int64_t* ranks, int64_t m, int64_t is) {
  constexpr int64_t PART = 128;
  const int64_t* end = ranks + m;
  for (int64_t from = 0, seen = 0; from < n && ranks < end; from += PART) {
    int64_t size = std::min(PART, n - from), ones = 0, passed = seen;
    uint64_t words[PART / 8] = {};
    if (size == PART) std::memcpy(words, row + from, PART);
    else std::memcpy(words, row + from, size);
    for (uint64_t word : words) ones += __builtin_popcountll(word);
    seen += is ? ones : size - ones;
    for (uint8_t* at = row + from; ranks < end && *ranks < seen; at++) {
      bool one_of_them = *at == is;
      if (one_of_them & (passed == *ranks)) *at = !is, ranks++;
      passed += one_of_them;
    }
  }
}
