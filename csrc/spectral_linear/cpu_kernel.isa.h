// The spectral linear layer around its matrix products on the CPU, compiled once for each instruction set.
#include "common/cpu_matrix.isa.h"
#include "common/cpu_products.isa.h"

// Parts of a sum over rows; fixed, so that results do not depend on the threads.
constexpr int64_t kParts = 16;
// Elements that are worth a thread.
constexpr int64_t kElementsPerThread = 32768;

// sum += weights times `count` rows that follow one another.
template <int64_t count, typename T, typename A>
PAPER_LAYERS_INLINE void add_rows(const A* weights, const T* rows, int64_t columns, A* sum) {
  using V = Vec<A>;
  V by[count];
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; ++i) by[i] = V(weights[i]);
  const auto add = [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    V total = load(sum + c, lanes);
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; ++i) total = multiply_add(by[i], load(rows + i * columns + c, lanes), total);
    store(sum + c, total, lanes);
  };
  int64_t c = 0;
  for (; c + V::size <= columns; c += V::size) add(c, Full{});
  if (c < columns) add(c, columns - c);
}

// The sum of all rows times what weigh(count, row, its elements, weights) writes for `count` of them, in one pass.
template <typename T, typename Weigh>
Scratch<Accumulator<T>> sum_of_rows(Matrix matrix, const T* from, const Weigh& weigh) {
  using A = Accumulator<T>;
  const int64_t columns = matrix.columns, per_part = (matrix.rows + kParts * kGroup - 1) / (kParts * kGroup) * kGroup;
  Scratch<A> sums(kParts * columns);
  const int64_t grain = grain_size(kElementsPerThread, {per_part, columns});
  parallel_for(0, kParts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      A* const sum = sums.data() + part * columns;
      int64_t row = part * per_part;
      const int64_t last = std::min(matrix.rows, row + per_part);
      const auto add = [&](auto count) {
        A weights[count];
        weigh(count, row, from + row * columns, weights);
        add_rows<count>(weights, from + row * columns, columns, sum);
        row += count;
      };
      while (row + kGroup <= last) add(std::integral_constant<int64_t, kGroup>());
      while (row < last) add(std::integral_constant<int64_t, 1>());
    }
  });
  for (int64_t part = 1; part < kParts; ++part) {
    const A one = 1;
    add_rows<1>(&one, sums.data() + part * columns, columns, sums.data());
  }
  sums.resize(columns);
  return sums;
}

template <typename A>
A length_of(const Scratch<A>& x) {
  double sum = 0;
  for (const A value : x) sum += static_cast<double>(value) * value;
  return static_cast<A>(std::sqrt(sum));
}

template <typename T, typename A>
void write_over(const Scratch<A>& x, A divisor, T* to) {
  for (size_t i = 0; i < x.size(); ++i) to[i] = static_cast<T>(x[i] / divisor);
}

// left = weight v and right = weight^T left over their lengths, the second of which is sigma. Both come from one pass
// over the weight, as left's length can divide the sum.
template <typename T, typename A>
void power_iteration(Matrix matrix, const T* weight, const T* any_v, T* left, T* right, A* sigma) {
  Scratch<A> v(matrix.columns), along(matrix.rows);
  for (int64_t i = 0; i < matrix.columns; ++i) v[i] = static_cast<A>(any_v[i]);
  Scratch<A> back = sum_of_rows(matrix, weight, [&](auto count, int64_t row, const T* rows, A* weights) {
    products<count>(v.data(), rows, matrix.columns, weights);
    for (int64_t i = 0; i < count; ++i) along[row + i] = weights[i];
  });
  constexpr A kShortest = A(1e-12);
  const A length = std::max(length_of(along), kShortest);
  write_over(along, length, left);
  for (A& value : back) value /= length;
  *sigma = length_of(back);
  write_over(back, std::max(*sigma, kShortest), right);
}

template <typename T>
void sum_rows(Matrix matrix, const T* from, T* to) {
  using A = Accumulator<T>;
  const Scratch<A> sums = sum_of_rows(matrix, from, [](auto count, int64_t, const T*, A* weights) {
    for (int64_t i = 0; i < count; ++i) weights[i] = 1;
  });
  write_over(sums, A(1), to);
}

// The sum of the products of two matrices' elements.
template <typename T>
void dot(Matrix matrix, const T* a, const T* b, double* result) {
  using A = Accumulator<T>;
  std::vector<double> sums(matrix.rows);
  const int64_t columns = matrix.columns;
  parallel_for(0, matrix.rows, grain_size(kElementsPerThread, {columns}), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      using V = Vec<A>;
      const T *x = a + row * columns, *y = b + row * columns;
      V even(A(0)), odd(A(0));
      int64_t c = 0;
      for (; c + 2 * V::size <= columns; c += 2 * V::size) {
        even = multiply_add(load(x + c), load(y + c), even);
        odd = multiply_add(load(x + c + V::size), load(y + c + V::size), odd);
      }
      for (; c + V::size <= columns; c += V::size) even = multiply_add(load(x + c), load(y + c), even);
      if (c < columns) even = multiply_add(load(x + c, columns - c), load(y + c, columns - c), even);
      sums[row] = total_of((even + odd).lanes);
    }
  });
  *result = std::accumulate(sums.begin(), sums.end(), 0.0);
}

// to += scale * left right^T
template <typename T, typename A>
void add_outer(Matrix matrix, A scale, const A* left, const A* right, T* to) {
  using V = Vec<A>;
  const int64_t columns = matrix.columns;
  parallel_for(0, matrix.rows, grain_size(kElementsPerThread, {columns}), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* const row = to + r * columns;
      const V by(scale * left[r]);
      const auto add = [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        store(row + c, multiply_add(by, load(right + c, lanes), load(static_cast<const T*>(row) + c, lanes)), lanes);
      };
      int64_t c = 0;
      for (; c + V::size <= columns; c += V::size) add(c, Full{});
      if (c < columns) add(c, columns - c);
    }
  });
}
