// Products of vectors. Included inside a namespace for each instruction set, hence without an include guard.

// Vectors of channels, and rows, that are computed side by side.
constexpr int64_t kGroup = 4;

// Products of a row with `count` rows, at most kGroup, that follow one another.
template <int64_t count, typename T, typename A>
PAPER_LAYERS_INLINE void products(const A* row, const T* others, int64_t channels, A* to) {
  using V = Vec<A>;
  V sums[count];
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; ++i) sums[i] = V(A(0));
  const auto add = [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    const V x = load(row + c, lanes);
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; ++i) sums[i] = multiply_add(x, load(others + i * channels + c, lanes), sums[i]);
  };
  int64_t c = 0;
  for (; c + V::size <= channels; c += V::size) add(c, Full{});
  if (c < channels) add(c, channels - c);
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; ++i) to[i] = total_of(sums[i].lanes);
}
