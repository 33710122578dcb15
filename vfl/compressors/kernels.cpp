// Maps of float32 vectors, a row each, in one pass over the memory, or in two of which the second finds its row in the
// cache.
//
// Letters: v and out [rows, D], keys [rows] of random numbers u. Every entry is computed as by the operators of
// quantize.py and sparse.py, with a rounding after each: so no product is fused with a sum.

#pragma GCC optimize("fp-contract=off", "no-trapping-math")  // before the headers, whose functions are part of the loops

#include "../philox.h"
#include "../splitmix.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr uint32_t SIGN = 0x80000000, EXPONENT = 0x7F800000;
constexpr int64_t PART = 1024;

inline uint32_t as_bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

inline float as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

inline float number(int64_t bits) {  // of a float64
  double y;
  std::memcpy(&y, &bits, sizeof y);
  return float(y);
}

inline float within(float x, float most) { return x < -most ? -most : x > most ? most : x; }  // NaN stays NaN

}  // namespace

extern "C" void sign(const float* v, float* out, int64_t rows, int64_t D, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) {
    const float* x = v + r * D;
    float* y = out + r * D;
    double sum = 0;  // of float32's sums of PART entries, which take half the time of float64's
    for (int64_t from = 0; from < D; from += PART) {
      int64_t to = std::min(from + PART, D);
      float part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = from; i < to; i++) part += std::fabs(x[i]);
      sum += part;
    }
    uint32_t mean = as_bits(float(sum) / float(D));
    for (int64_t i = 0; i < D; i++) y[i] = as_float((as_bits(x[i]) & SIGN) | mean);
  }
}

// sizes [layers]: the entries of each, at least 1; `most`: 2^bits - 1. With thresholds [rows], the entries of a layer
// whose size is under that quantile become 0; kept [rows]: how many do not.
extern "C" void quantize(const float* v, const int64_t* sizes, const double* thresholds, float* out, int64_t* kept,
                         int64_t rows, int64_t D, int64_t layers, int64_t most, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) {
    const float* x = v + r * D;
    float* y = out + r * D;
    std::vector<uint32_t> ordered;
    for (int64_t l = 0; l < layers; x += sizes[l], y += sizes[l], l++) {
      int64_t n = sizes[l];
      float low = x[0], high = x[0];
      int32_t unknown = 0;  // minima and maxima pass over NaN
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : unknown)
      for (int64_t i = 0; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        unknown |= x[i] != x[i];
      }
      if (unknown) low = std::numeric_limits<float>::quiet_NaN();
      float step = (high - low) / float(most), unit = step > 0 ? step : 1;
      for (int64_t i = 0; i < n; i++) {
        float level = std::nearbyint((x[i] - low) / unit) * step;
        y[i] = level + low;
      }
      if (!thresholds) continue;
      ordered.resize(n);  // without their signs, floats are ordered as their bits are, with NaN last
      for (int64_t i = 0; i < n; i++) ordered[i] = as_bits(x[i]) & ~SIGN;
      auto least = ordered.begin() + int64_t(std::ceil(thresholds[r] * double(n - 1)));
      std::nth_element(ordered.begin(), least, ordered.end());
      float smallest = as_float(*least);
      int64_t count = 0;
      for (int64_t i = 0; i < n; i++) {
        int32_t keep = std::fabs(x[i]) >= smallest;
        y[i] *= keep;
        count += keep;
      }
      kept[r] += count;
    }
  }
}

// The largest size in each row, as out [rows]; NaN where there is one, since its bits are larger than all others'.
extern "C" void largest(const float* v, float* out, int64_t rows, int64_t D, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) {
    const float* x = v + r * D;
    uint32_t most = 0;
    for (int64_t i = 0; i < D; i++) most = std::max(most, as_bits(x[i]) & ~SIGN);
    out[r] = as_float(most);
  }
}

// steps [rows]: from one level to the next, of s levels.
extern "C" void standard_dithering(const float* v, const int64_t* keys, const float* steps, float* out, int64_t rows,
                                   int64_t D, int64_t s, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) {
    const float* x = v + r * D;
    float *y = out + r * D, step = steps[r], unit = step > 0 ? step : 1, most = float(s);
    philox::uniform(keys[r], D, [=](int64_t i, float u) {
      float scaled = x[i] / unit;
      y[i] = within(std::floor(u + scaled), most) * step;
    });
  }
}

// steps [rows]: the lowest level, of s.
extern "C" void natural_dithering(const float* v, const int64_t* keys, const float* steps, float* out, int64_t rows,
                                  int64_t D, int64_t s, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) {
    const float* x = v + r * D;
    float *y = out + r * D, step = steps[r], unit = step > 0 ? step : 1, most = float(int64_t(1) << (s - 1));
    philox::uniform(keys[r], D, [=](int64_t i, float u) {
      float away = as_float((as_bits(x[i]) & SIGN) | as_bits(u)), scaled = x[i] / unit;
      float gap = as_float(as_bits(scaled) & EXPONENT);
      float raised = away * (gap < 1 ? 1 : gap);
      raised = raised + scaled;
      y[i] = within(std::nearbyint(as_float(as_bits(raised) & (SIGN | EXPONENT))), most) * step;
    });
  }
}

extern "C" void natural(const float* v, const int64_t* keys, float* out, int64_t rows, int64_t D, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) {
    const float* x = v + r * D;
    float* y = out + r * D;
    philox::uniform(keys[r], D, [=](int64_t i, float u) {
      uint32_t below = int32_t(u * 0x1p23f);
      float value = as_float((as_bits(x[i]) + below) & (SIGN | EXPONENT)), nothing = x[i] * 0.0f;
      y[i] = value + nothing;
    });
  }
}

// Vectors whose keys [rows] draw at most `most` are sent [rows], times the factor; the others are zero times themselves.
extern "C" void bernoulli(const float* v, const int64_t* keys, float* out, double* sent, int64_t rows, int64_t D,
                          int64_t most, int64_t factor, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) {
    const float* x = v + r * D;
    float* y = out + r * D;
    sent[r] = splitmix::bits(keys[r], 0) <= most;
    float times = float(sent[r]) * number(factor);
    for (int64_t i = 0; i < D; i++) y[i] = x[i] * times;
  }
}

// The entries at [rows, k] times the factor; the others are zero times themselves.
extern "C" void chosen(const float* v, const int64_t* at, float* out, int64_t rows, int64_t D, int64_t k, int64_t factor,
                       int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) {
    const float* x = v + r * D;
    const int64_t* places = at + r * k;
    float *y = out + r * D, times = number(factor);
    for (int64_t i = 0; i < D; i++) y[i] = x[i] * 0;
    for (int64_t j = 0; j < k; j++) y[places[j]] = x[places[j]] * times;
  }
}

// The entries whose mask [rows, D] is 1 times the factor; the others are zero times themselves.
extern "C" void masked(const float* v, const uint8_t* mask, float* out, int64_t rows, int64_t D, int64_t factor,
                       int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) {
    const float* x = v + r * D;
    const uint8_t* one = mask + r * D;
    float *y = out + r * D, times = number(factor);
    for (int64_t i = 0; i < D; i++) y[i] = one[i] * x[i] * times;
  }
}
