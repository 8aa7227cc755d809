// Matrix products. Included inside a namespace for each instruction set, hence without an include guard.
//
// Every element of a product is one sum, taken in order: its bits depend neither on threads nor on the other rows and
// columns, as they may where a library chooses its way by sizes.

// Registers hold so many rows, of so many vectors, of a product.
constexpr int64_t kTileRows = PAPER_LAYERS_VECTOR_BYTES == 64 ? 12 : 6, kTileVectors = 2;
// Terms of the sums at a time: so many rows of a tile's vectors stay in the first cache.
constexpr int64_t kTerms = 256;

// Element (i, j) is data[i * row + j * column].
template <typename A>
struct MatrixView {
  const A* data;
  int64_t row, column;
};

template <int64_t rows, int64_t vectors, typename A, typename Lanes>
PAPER_LAYERS_INLINE void multiply_tile(MatrixView<A> a, const A* b, int64_t b_row, int64_t terms, bool add, A* to,
                                       int64_t to_row, Lanes lanes) {
  using V = Vec<A>;
  V sums[rows][vectors];
#pragma GCC unroll 12
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < vectors; ++v) sums[r][v] = add ? load(to + r * to_row + v * V::size, lanes) : V(A(0));
  }
  for (int64_t t = 0; t < terms; ++t) {
    V right[vectors];
#pragma GCC unroll 2
    for (int64_t v = 0; v < vectors; ++v) right[v] = load(b + t * b_row + v * V::size);
#pragma GCC unroll 12
    for (int64_t r = 0; r < rows; ++r) {
      const V left(a.data[r * a.row + t * a.column]);
#pragma GCC unroll 2
      for (int64_t v = 0; v < vectors; ++v) sums[r][v] = multiply_add(left, right[v], sums[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < vectors; ++v) store(to + r * to_row + v * V::size, sums[r][v], lanes);
  }
}

// Some terms of `vectors` columns' vectors, of which the last has `lanes`.
template <int64_t vectors, typename A, typename Lanes>
void multiply_panel(MatrixView<A> a, const A* b, int64_t b_row, int64_t rows, int64_t terms, bool add, A* to,
                    int64_t to_row, Lanes lanes) {
  constexpr int64_t width = vectors * Vec<A>::size;
  alignas(64) A packed[kTerms * width];
  if (rows > kTileRows || !std::is_same_v<Lanes, Full>) {
    for (int64_t t = 0; t < terms; ++t) {
#pragma GCC unroll 2
      for (int64_t v = 0; v < width; v += Vec<A>::size) store(packed + t * width + v, load(b + t * b_row + v, lanes));
    }
    b = packed;
    b_row = width;
  }
  int64_t i = 0;
  const auto tiles = [&](auto size) __attribute__((always_inline)) {
    for (; i + size <= rows; i += size) {
      multiply_tile<size, vectors>(MatrixView<A>{a.data + i * a.row, a.row, a.column}, b, b_row, terms, add,
                                   to + i * to_row, to_row, lanes);
    }
  };
  tiles(std::integral_constant<int64_t, kTileRows>());
  tiles(std::integral_constant<int64_t, kTileRows / 3>());
  tiles(std::integral_constant<int64_t, 1>());
}

// to (columns, rows) = from^T, from (rows, columns), whose rows are so far apart.
template <typename A>
void transpose_matrix(const A* from, int64_t from_row, int64_t rows, int64_t columns, A* to) {
  constexpr int64_t size = Vec<A>::size;
  alignas(64) A tile[size * size], turned[size * size];
  for (int64_t i = 0; i < rows; i += size) {
    for (int64_t j = 0; j < columns; j += size) {
      const int64_t height = std::min(size, rows - i), width = std::min(size, columns - j);
      if (height < size || width < size) {
        for (int64_t c = 0; c < width; ++c) {
          for (int64_t r = 0; r < height; ++r) to[(j + c) * rows + i + r] = from[(i + r) * from_row + j + c];
        }
        continue;
      }
      for (int64_t r = 0; r < size; ++r) store(tile + r * size, load(from + (i + r) * from_row + j));
      transpose(tile, size, turned);
      for (int64_t c = 0; c < size; ++c) store(to + (j + c) * rows + i, load(turned + c * size));
    }
  }
}

// to (rows, columns) = a (rows, terms) b (terms, columns), or += where `add`. Rows of b and `to` are so far apart.
template <typename A>
void multiply(MatrixView<A> a, const A* b, int64_t b_row, int64_t rows, int64_t terms, int64_t columns, bool add, A* to,
              int64_t to_row) {
  constexpr int64_t size = Vec<A>::size, width = kTileVectors * size;
  // Each panel reads all of a: in whole lines, then.
  Scratch<A> turned;
  if (a.row == 1 && a.column > 1 && columns > 2 * width) {
    turned.resize(rows * terms);
    transpose_matrix(a.data, a.column, terms, rows, turned.data());
    a = {turned.data(), terms, 1};
  }
  for (int64_t j = 0; j < columns;) {
    const int64_t left = columns - j;
    int64_t t = 0;
    do {
      const int64_t count = std::min(kTerms, terms - t);
      const MatrixView<A> part{a.data + t * a.column, a.row, a.column};
      const A* const from = b + t * b_row + j;
      const bool more = add || t > 0;
      if (left >= width) multiply_panel<kTileVectors>(part, from, b_row, rows, count, more, to + j, to_row, Full{});
      else if (left >= size) multiply_panel<1>(part, from, b_row, rows, count, more, to + j, to_row, Full{});
      else multiply_panel<1>(part, from, b_row, rows, count, more, to + j, to_row, left);
      t += count;
    } while (t < terms);
    j += left >= width ? width : std::min(left, size);
  }
}
