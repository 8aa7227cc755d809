// Small matrix products. Included inside a namespace for each instruction set, hence without an include guard.

// Computes some rows and a vector of columns of to = alpha a b + added.
template <int64_t rows, typename A, typename Lanes>
PAPER_LAYERS_INLINE void multiply_tile(MatrixView<A> a, MatrixView<A> b, int64_t terms, A alpha, const A* added,
                                       int64_t added_row, A* to, int64_t to_row, Lanes lanes) {
  using V = Vec<A>;
  V sums[rows];
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) sums[r] = V(A(0));
  for (int64_t t = 0; t < terms; ++t) {
    const V right = load(b.data + t * b.row, lanes);
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r) {
      sums[r] = multiply_add(V(a.data[r * a.row + t * a.column]), right, sums[r]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const V plus = added ? load(added + r * added_row, lanes) : V(A(0));
    store(to + r * to_row, multiply_add(V(alpha), sums[r], plus), lanes);
  }
}

// to = alpha a b + added, where `added` is null or has rows `added_row` apart.
template <typename A>
void multiply_small(MatrixView<A> a, MatrixView<A> b, int64_t rows, int64_t terms, int64_t columns, A alpha,
                    const A* added, int64_t added_row, A* to) {
  Scratch<A> dense;
  if (b.column != 1) {
    dense.resize(terms * columns);
    for (int64_t t = 0; t < terms; ++t) {
      for (int64_t j = 0; j < columns; ++j) dense[t * columns + j] = b.data[t * b.row + j * b.column];
    }
    b = {dense.data(), columns, 1};
  }
  const auto of_columns = [&](int64_t j, auto lanes) {
    int64_t i = 0;
    const auto tiles = [&](auto count) __attribute__((always_inline)) {
      for (; i + count <= rows; i += count) {
        multiply_tile<count, A>({a.data + i * a.row, a.row, a.column}, {b.data + j, b.row, 1}, terms, alpha,
                                added ? added + i * added_row + j : nullptr, added_row, to + i * columns + j, columns,
                                lanes);
      }
    };
    tiles(std::integral_constant<int64_t, 4>());
    tiles(std::integral_constant<int64_t, 1>());
  };
  int64_t j = 0;
  for (; j + Vec<A>::size <= columns; j += Vec<A>::size) of_columns(j, Full{});
  if (j < columns) of_columns(j, columns - j);
}
