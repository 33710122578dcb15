// Products of small float32 matrices, several at once: c = a b, or c = base + factor (a b).
//
// Letters: z products, a [z, m, k], b [z, k, n], base and c [z, m, n], all in floats. A vector is W neighbouring floats.
// Strides are in floats. Rows of base and c lie side by side; a may have any strides. Where b's columns are neighbours,
// a tile of c is a sum of outer products over k, kept in registers. Where the entries of a column of b are neighbours
// (b is a transposed matrix), it is made of dot products along k. The rows of a, in dot products, or those of b, in outer
// ones, may be rows of a table, named by their numbers: a minibatch need not be copied together first.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16, ROWS = 12, SQUARE = 5;  // tiles of ROWS x 2 vectors and of SQUARE x SQUARE dot products fill 32 registers
#elif defined(__AVX2__)
constexpr int W = 8, ROWS = 6, SQUARE = 3;  // and of these 16
#else
constexpr int W = 4, ROWS = 6, SQUARE = 3;
#endif
constexpr int64_t PANEL = 1 << 15;    // of a's entries that dot products with every column of b find in the cache
constexpr int64_t SHARED = 1 << 19;  // multiplications from which threads share the work
constexpr int64_t AHEAD = 4;          // vectors by which rows of a table are fetched before they are read: such rows, and
                                      // those of base, are too short or too many for the processor to see it coming

typedef float Vector __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline void fetch(const float* from) { __builtin_prefetch(from); }
inline Vector all(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void put_all(float* to, Vector v) { *reinterpret_cast<Vector*>(to) = v; }

#if defined(__AVX512F__)
inline Vector multiply_add(Vector a, Vector b, Vector c) { return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Vector spread(const float* from) { return (Vector)_mm512_set1_ps(*from); }  // which loads it so
inline Vector first(const float* from, int count) { return (Vector)_mm512_maskz_loadu_ps((1u << count) - 1, from); }
inline void put_first(float* to, Vector v, int count) { _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)v); }
#else
#if defined(__AVX2__) && defined(__FMA__)
inline Vector multiply_add(Vector a, Vector b, Vector c) { return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Vector spread(const float* from) { return (Vector)_mm256_set1_ps(*from); }
#else
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
inline Vector spread(const float* from) { return Vector{} + *from; }
#endif
inline Vector first(const float* from, int count) {
  Vector v = {};
  for (int i = 0; i < count; i++) v[i] = from[i];
  return v;
}
inline void put_first(float* to, Vector v, int count) {
  for (int i = 0; i < count; i++) to[i] = v[i];
}
#endif

// `count` of the W, and zeros; the common case without a mask.
inline Vector get(const float* from, int count) { return count == W ? all(from) : first(from, count); }
inline void put(float* to, Vector v, int count) { count == W ? put_all(to, v) : put_first(to, v, count); }

struct Product {  // one of the z
  const float *a, *b, *base;  // base: or null
  float* c;
  const int64_t *a_rows, *b_rows;  // their numbers [m] or [k], or null
  int64_t m, k, n, a_row, a_column, b_line;  // b_line: from one run of neighbours in b to the next
  float factor;
};

// c[i : i + R, j : j + (V - 1) W + last], of which the last vector may be cut.
template <int R, int V>
void outer_tile(const Product& p, int64_t i, int64_t j, int last) {
  Vector sum[R][V] = {};
  const float *a = p.a + i * p.a_row, *b = p.b + j;
  if (p.base) {
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) fetch(p.base + (i + r) * p.n + j + (V + v) * W);  // the next tile's
  }
  for (int64_t q = 0; q < p.k; q++, a += p.a_column) {
    const float* from = b + (p.b_rows ? p.b_rows[q] : q) * p.b_line;
    if (p.b_rows) {
      for (int v = 0; v < V; v++) fetch(from + (AHEAD + v) * W);
    }
    Vector line[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) line[v] = get(from + v * W, v == V - 1 ? last : W);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      Vector x = spread(a + r * p.a_row);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[r][v] = multiply_add(x, line[v], sum[r][v]);
    }
  }
  auto finish = [&](auto whole) {
    Vector factor = Vector{} + p.factor;
    const float* base = p.base ? p.base + i * p.n + j : nullptr;
    float* c = p.c + i * p.n + j;
#pragma GCC unroll 12
    for (int r = 0; r < R; r++, c += p.n) {
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        int count = whole || v < V - 1 ? W : last;
        Vector x = sum[r][v];
        if (base) x = multiply_add(factor, x, get(base + r * p.n + v * W, count));
        put(c + v * W, x, count);
      }
    }
  };
  last == W ? finish(std::true_type{}) : finish(std::false_type{});
}

template <int R>
void outer_columns(const Product& p, int64_t i, int64_t j) {
  int64_t left = p.n - j;
  if (left >= 2 * W) outer_tile<R, 2>(p, i, j, W);
  else if (left > W) outer_tile<R, 2>(p, i, j, left - W);
  else if (left == W) outer_tile<R, 1>(p, i, j, W);
  else outer_tile<R, 1>(p, i, j, left);
}

template <int R = ROWS>
void outer_rows(const Product& p, int64_t rows, int64_t i, int64_t j) {
  if (rows == R) outer_columns<R>(p, i, j);
  else if constexpr (R > 1) outer_rows<R - 1>(p, rows, i, j);
}

// c is made of tiles of about equal height. Where it is b that is long, all tiles of two vectors' columns are made while
// these lie in the cache; else all of some rows, so that those of base and c are gone through in order.
struct Tiles {
  int64_t m, n, down = (m + ROWS - 1) / ROWS, across = (n + 2 * W - 1) / (2 * W);
};

void outer_products(const Product& p, const Tiles& tiles, int64_t line, bool by_rows) {
  int64_t i = by_rows ? line : 0, j = by_rows ? 0 : line;
  int64_t down = by_rows ? line + 1 : tiles.down, across = by_rows ? tiles.across : line + 1;
  for (; i < down; i++) {
    int64_t first = p.m * i / tiles.down, rows = p.m * (i + 1) / tiles.down - first;
    for (int64_t t = j; t < across; t++) outer_rows(p, rows, first, t * 2 * W);
  }
}

// c[i : i + R, j : j + N]
template <int R, int N>
void dot_tile(const Product& p, int64_t i, int64_t j) {
  Vector sum[R * N] = {};
  const float *a[R], *later[R], *b = p.b + j * p.b_line;
  for (int r = 0; r < R; r++) a[r] = p.a + (p.a_rows ? p.a_rows[i + r] : i + r) * p.a_row;
  bool fetched = p.a_rows && j == 0;  // the next tile's rows, which further columns find in the cache
  for (int r = 0; r < R; r++) later[r] = p.a + (fetched && i + R + r < p.m ? p.a_rows[i + R + r] : 0) * p.a_row;
  auto add = [&](int64_t q, int count) {
    Vector column[N];
#pragma GCC unroll 5
    for (int s = 0; s < N; s++) column[s] = get(b + s * p.b_line + q, count);
#pragma GCC unroll 5
    for (int r = 0; r < R; r++) {
      Vector row = get(a[r] + q, count);
#pragma GCC unroll 5
      for (int s = 0; s < N; s++) sum[r * N + s] = multiply_add(row, column[s], sum[r * N + s]);
    }
  };
  int64_t q = 0;
  for (; q + W <= p.k; q += W) {
    if (fetched) {
#pragma GCC unroll 5
      for (int r = 0; r < R; r++) fetch(later[r] + q);
    }
    add(q, W);
  }
  if (q < p.k) add(q, p.k - q);
  float total[(R * N + W - 1) / W * W];
#if defined(__AVX512F__)
  // The entries of 16 vectors summed by halves: each step leaves half as many vectors.
#pragma GCC unroll 2
  for (int t = 0; t < R * N; t += 16) {
    __m512 x[16];
#pragma GCC unroll 16
    for (int s = 0; s < 16; s++) x[s] = t + s < R * N ? (__m512)sum[t + s < R * N ? t + s : 0] : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int s = 0; s < 8; s++) x[s] = _mm512_shuffle_f32x4(x[s], x[s + 8], 0x44) + _mm512_shuffle_f32x4(x[s], x[s + 8], 0xEE);
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++) x[s] = _mm512_shuffle_f32x4(x[s], x[s + 4], 0x88) + _mm512_shuffle_f32x4(x[s], x[s + 4], 0xDD);
#pragma GCC unroll 2
    for (int s = 0; s < 4; s += 2) x[s] = _mm512_unpacklo_ps(x[s], x[s + 1]) + _mm512_unpackhi_ps(x[s], x[s + 1]);
    x[0] = _mm512_shuffle_ps(x[0], x[2], 0x44) + _mm512_shuffle_ps(x[0], x[2], 0xEE);
    _mm512_storeu_ps(total + t, _mm512_shuffle_f32x4(x[0], x[0], 0xD8));  // whose quarters came as 0, 2, 1, 3
  }
#else
  for (int t = 0; t < R * N; t++) {
    total[t] = 0;
    for (int l = 0; l < W; l++) total[t] += sum[t][l];
  }
#endif
#pragma GCC unroll 5
  for (int r = 0; r < R; r++)
#pragma GCC unroll 5
    for (int s = 0; s < N; s++) {
      int64_t at = (i + r) * p.n + j + s;
      p.c[at] = p.base ? p.base[at] + p.factor * total[r * N + s] : total[r * N + s];
    }
}

template <int R, int N = SQUARE>
void dot_columns(const Product& p, int64_t columns, int64_t i, int64_t j) {
  if (columns == N) dot_tile<R, N>(p, i, j);
  else if constexpr (N > 1) dot_columns<R, N - 1>(p, columns, i, j);
}

template <int R = SQUARE>
void dot_rows(const Product& p, int64_t rows, int64_t columns, int64_t i, int64_t j) {
  if (rows == R) dot_columns<R>(p, columns, i, j);
  else if constexpr (R > 1) dot_rows<R - 1>(p, rows, columns, i, j);
}

// Rows `from` to `to` of one of the `blocks` of columns.
void dot_products(const Product& p, int64_t from, int64_t to, int64_t block, int64_t blocks) {
  int64_t j = p.n * block / blocks, columns = p.n * (block + 1) / blocks - j;
  int64_t tiles = (to - from + SQUARE - 1) / SQUARE;
  for (int64_t t = 0; t < tiles; t++) {
    int64_t i = from + (to - from) * t / tiles;
    dot_rows(p, from + (to - from) * (t + 1) / tiles - i, columns, i, j);
  }
}

}  // namespace

// base, factor and rows may be null.
extern "C" void products(
    const float* a, const float* b, const float* base, const float* factor, const int64_t* rows, float* c,
    int64_t z, int64_t m, int64_t k, int64_t n,
    int64_t a_next, int64_t a_row, int64_t a_column, int64_t b_next, int64_t b_line,
    int64_t base_next, int64_t factor_next, int64_t transposed, int64_t threads) {
  auto product = [&](int64_t i) {
    return Product{a + i * a_next, b + i * b_next, base ? base + i * base_next : nullptr, c + i * m * n,
                   rows && transposed ? rows + i * m : nullptr, rows && !transposed ? rows + i * k : nullptr,
                   m, k, n, a_row, a_column, b_line, base ? factor[i * factor_next] : 1};
  };
  if (z * m * k * n < SHARED) threads = 1;
  if (transposed) {
    int64_t most = std::max<int64_t>(PANEL / std::max<int64_t>(k, 1) / SQUARE * SQUARE, SQUARE);
    int64_t blocks = (n + SQUARE - 1) / SQUARE;
    for (int64_t from = 0; from < m; from += most) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
      for (int64_t t = 0; t < z * blocks; t++)
        dot_products(product(t / blocks), from, std::min(from + most, m), t % blocks, blocks);
    }
  } else {
    Tiles tiles{m, n};
    bool by_rows = m > k;
    int64_t lines = by_rows ? tiles.down : tiles.across;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < z * lines; t++) outer_products(product(t / lines), tiles, t % lines, by_rows);
  }
}
