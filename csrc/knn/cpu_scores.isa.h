// The scores of panels of points for queries, compiled once for each instruction set.

// The kinds of scores: products, from which distances follow; where too many of them differ by less than their errors,
// -|x - y|^2 in T, in error by little of itself; where that does not do, exact distances with their sign changed.
enum class Scores { products, differences, exact };

// Registers hold kRows x kVectors vectors of the product; a panel is kVectors vectors of rows, whole numbers of kRows.
constexpr int64_t kVectors = 3;
template <typename T>
constexpr int64_t kRows = PAPER_LAYERS_VECTOR_BYTES == 64 ? 8 : Vec<T>::size == 2 ? 3 : 4;
template <typename T>
constexpr int64_t kWidth = kVectors * Vec<T>::size;

// For kRows queries, of their panel's width, and the first vectors of a panel of points: sum = add(x, y, sum) over
// channels, and to = change(to, sum), in rows that are `to_row` apart.
template <int64_t vectors, typename T, typename Add, typename Change>
PAPER_LAYERS_INLINE void sum_channels(const T* queries, const T* points, int64_t first, int64_t end, int64_t step, T* to,
                                      int64_t to_row, Add add, Change change) {
  using V = Vec<T>;
  constexpr int64_t width = kWidth<T>, rows = kRows<T>;
  V sums[rows][vectors];
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 3
    for (int64_t v = 0; v < vectors; ++v) sums[r][v] = V(T(0));
  }
  for (int64_t c = first; c < end; c += step) {
    V y[vectors];
#pragma GCC unroll 3
    for (int64_t v = 0; v < vectors; ++v) y[v] = load(points + c * width + v * V::size);
#pragma GCC unroll 8
    for (int64_t r = 0; r < rows; ++r) {
      const V x(queries[c * width + r]);
#pragma GCC unroll 3
      for (int64_t v = 0; v < vectors; ++v) sums[r][v] = add(x, y[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 3
    for (int64_t v = 0; v < vectors; ++v) {
      T* const at = to + r * to_row + v * V::size;
      store(at, change(at, sums[r][v]));
    }
  }
}

// The terms that scores are sums of. Functions of their own, so that the compiler keeps all sums in registers.
template <int64_t vectors, typename T>
__attribute__((noinline)) void multiply(const T* queries, const T* points, int64_t channels, T* to, int64_t to_row) {
  using V = Vec<T>;
  sum_channels<vectors>(
      queries, points, 0, channels, 1, to, to_row,
      [](V x, V y, V sum) __attribute__((always_inline)) { return multiply_add(x, y, sum); },
      [](const T*, V sum) __attribute__((always_inline)) { return sum; });
}

template <typename T>
__attribute__((noinline)) void subtract(const T* queries, const T* points, int64_t channels, T* to, int64_t to_row) {
  using V = Vec<T>;
  sum_channels<kVectors>(
      queries, points, 0, channels, 1, to, to_row,
      [](V x, V y, V sum) __attribute__((always_inline)) { return V(sum.lanes - (x - y).lanes * (x - y).lanes); },
      [](const T*, V sum) __attribute__((always_inline)) { return sum; });
}

// Some channels of exact distances: the first ones, or more.
template <bool inner, bool more, typename T>
__attribute__((noinline)) void measure_some(const T* queries, const T* points, int64_t first, int64_t end, int64_t step,
                                            T* to, int64_t to_row) {
  using V = Vec<T>;
  sum_channels<kVectors>(
      queries, points, first, end, step, to, to_row,
      [](V x, V y, V sum) __attribute__((always_inline)) { return V(sum.lanes + term<inner>(x.lanes, y.lanes)); },
      [](const T* at, V sum) __attribute__((always_inline)) {
        const V score = inner ? sum : V(-sum.lanes);
        return more ? load(at) + score : score;
      });
}

// In the order of exact_distances.
template <bool inner, typename T>
void measure(const T* queries, const T* points, int64_t channels, T* to, int64_t to_row) {
  const int64_t whole = channels / kSums * kSums;
  measure_some<inner, false>(queries, points, whole, channels, 1, to, to_row);
  for (int64_t s = 0; s < kSums && whole > 0; ++s) {
    measure_some<inner, true>(queries, points, s, whole, kSums, to, to_row);
  }
}
