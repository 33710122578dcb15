// Draws of vfl.random from Philox streams, a row for each key.

#include "philox.h"

extern "C" void uniform(const int64_t* keys, float* out, int64_t rows, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) {
    float* y = out + r * n;
    philox::uniform(keys[r], n, [=](int64_t i, float u) { y[i] = u; });
  }
}
