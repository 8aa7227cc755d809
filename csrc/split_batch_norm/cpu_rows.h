// channels_last: pixels are rows of channels. One sweep over blocks of rows takes sums of all channels, the next one
// writes, backwards, so that it begins with what the caches still hold.

// Rows that are summed in registers, and bytes of rows whose sums are merged in the dtype of sums.
constexpr int64_t kRows = 8, kChunkBytes = 1 << 17;

// Calls body(c, lanes) for each vector of channels, each channel once.
template <int64_t size, typename Body>
PAPER_LAYERS_INLINE void each_channels(int64_t channels, Body&& body) {
  int64_t c = 0;
  for (; c + size <= channels; c += size) body(c, Full{});
  if (c < channels) body(c, channels - c);
}

// Calls body(row, number of rows) for groups of rows, where the number is a constant for a whole group.
template <typename Body>
PAPER_LAYERS_INLINE void each_group(Range rows, Body&& body) {
  int64_t r = rows.begin;
  for (; r + kRows <= rows.end; r += kRows) body(r, std::integral_constant<int64_t, kRows>());
  if (r < rows.end) body(r, rows.end - r);
}

// The rows of each split in chunks. Their number does not depend on the threads, so results do not either.
struct Chunks {
  struct Chunk {
    int64_t split;
    Range rows;
  };
  std::vector<Chunk> chunks;
  std::vector<int64_t> starts = {0};  // of each split's chunks, and the end

  Chunks(const SplitBatchNormProblem& problem, int64_t element_size) {
    const int64_t groups = kChunkBytes / (problem.channels * element_size * kRows);
    const int64_t step = std::max<int64_t>(1, groups) * kRows;
    for (int64_t s = 0; s < problem.splits(); ++s) {
      const int64_t end = problem.starts[s + 1] * problem.pixels;
      for (int64_t r = problem.starts[s] * problem.pixels; r < end; r += step) {
        chunks.push_back({s, {r, std::min(r + step, end)}});
      }
      starts.push_back(size());
    }
  }
  int64_t size() const { return static_cast<int64_t>(chunks.size()); }

  // The second time, `backwards` for each thread.
  template <typename Body>
  void each(bool backwards, const Body& body) const {
    torch::stable::parallel_for(0, size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(backwards ? begin + end - 1 - i : i);
    });
  }
};

// Adds rows' moments to those of the rows before, `count` of them, for each channel.
template <typename T, typename N>
PAPER_LAYERS_INLINE void add_moments(const T* x, int64_t channels, N rows, int64_t count, const Accumulator<T>* origin,
                                     Accumulator<T>* means, Accumulator<T>* squares) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const A share = A(1) / A(rows), merged = A(rows) / A(count + rows), cross = A(count) * merged;
  each_channels<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    const V shift = load(origin + c, lanes);
    V deviation[kRows], sum(A(0)), square(A(0));
    for (int64_t r = 0; r < rows; ++r) {
      __builtin_prefetch(x + (r + rows) * channels + c, 0, 2);
      deviation[r] = load(x + r * channels + c, lanes) - shift;
      sum = sum + deviation[r];
    }
    const V mean = sum * V(share);
    for (int64_t r = 0; r < rows; ++r) {
      const V d = deviation[r] - mean;
      square = multiply_add(d, d, square);
    }
    const V before = load(means + c, lanes), delta = mean - before;
    store(means + c, multiply_add(delta, V(merged), before), lanes);
    store(squares + c, load(squares + c, lanes) + multiply_add(delta * delta, V(cross), square), lanes);
  });
}

// Mean and variance of each split, and of the mean what its rounding to A leaves.
template <typename T>
void row_moments(const SplitForward<T>& f, const Chunks& chunks, Accumulator<T>* rests) {
  using A = Accumulator<T>;
  const int64_t channels = f.problem.channels;
  // Relative to one of the values, sums lose no digits to an offset that all have.
  Scratch<A> origins(f.problem.splits() * channels), parts(chunks.size() * 2 * channels);
  for (int64_t s = 0; s < f.problem.splits(); ++s) {
    if (f.problem.count(s) == 0) continue;
    const T* row = f.input + f.problem.starts[s] * f.problem.pixels * channels;
    std::copy(row, row + channels, origins.begin() + s * channels);
  }
  chunks.each(false, [&](int64_t i) {
    const auto& [split, rows] = chunks.chunks[i];
    A *means = parts.data() + i * 2 * channels, *squares = means + channels;
    const int64_t first = rows.begin;
    each_group(rows, [&, split = split](int64_t r, auto count) __attribute__((always_inline)) {
      add_moments(f.input + r * channels, channels, count, r - first, origins.data() + split * channels, means,
                  squares);
    });
  });
  for (int64_t s = 0; s < f.problem.splits(); ++s) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = s * channels + c;
      Moments moments;
      for (int64_t i = chunks.starts[s]; i < chunks.starts[s + 1]; ++i) {
        const A* part = parts.data() + i * 2 * channels + c;
        moments.merge(chunks.chunks[i].rows.size(), part[0], part[channels]);
      }
      const double mean = origins[at] + moments.mean;
      f.mean[at] = static_cast<A>(mean);
      f.var[at] = static_cast<A>(moments.squares / moments.count);
      rests[at] = static_cast<A>(mean - double(f.mean[at]));
    }
  }
}

template <typename T>
void forward_rows(const SplitForward<T>& f) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const int64_t channels = f.problem.channels, values = f.problem.splits() * channels;
  const Chunks chunks(f.problem, sizeof(T));
  Scratch<A> rests(values), scales(values), shifts(values);
  if (!f.has_statistics) row_moments(f, chunks, rests.data());
  if (!f.output) return;
  for (int64_t at = 0; at < values; ++at) {
    const Affine<A> affine = normalization(f, at, double(f.mean[at]) + double(rests[at]));
    scales[at] = affine.scale;
    shifts[at] = affine.shift;
  }
  chunks.each(!f.has_statistics, [&](int64_t i) {
    const auto& [split, rows] = chunks.chunks[i];
    const A *centers = f.mean + split * channels, *scale = scales.data() + split * channels,
            *shift = shifts.data() + split * channels;
    each_group(rows, [&](int64_t row, auto count) __attribute__((always_inline)) {
      const T* x = f.input + row * channels;
      T* y = f.output + row * channels;
      each_channels<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const V m = load(centers + c, lanes), a = load(scale + c, lanes), b = load(shift + c, lanes);
        for (int64_t r = 0; r < count; ++r) {
          store(y + r * channels + c, multiply_add(load(x + r * channels + c, lanes) - m, a, b), lanes);
        }
      });
    });
  });
}

// Sums over each split of grad times the normalised input, and of grad.
template <typename T>
void row_sums(const SplitBackward<T>& b, const Chunks& chunks) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const int64_t channels = b.problem.channels;
  Scratch<A> parts(chunks.size() * 2 * channels);
  chunks.each(false, [&](int64_t i) {
    const auto& [split, rows] = chunks.chunks[i];
    const A* centers = b.mean + split * channels;
    A *products = parts.data() + i * 2 * channels, *sums = products + channels;
    each_group(rows, [&](int64_t row, auto count) __attribute__((always_inline)) {
      const T *g = b.grad + row * channels, *x = b.input + row * channels;
      each_channels<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const V center = load(centers + c, lanes);
        V product(A(0)), sum(A(0));
        for (int64_t r = 0; r < count; ++r) {
          __builtin_prefetch(g + (r + count) * channels + c, 0, 2);
          __builtin_prefetch(x + (r + count) * channels + c, 0, 2);
          const V grad = load(g + r * channels + c, lanes);
          sum = sum + grad;
          product = multiply_add(grad, load(x + r * channels + c, lanes) - center, product);
        }
        store(products + c, load(products + c, lanes) + product, lanes);
        store(sums + c, load(sums + c, lanes) + sum, lanes);
      });
    });
  });
  for (int64_t s = 0; s < b.problem.splits(); ++s) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = s * channels + c;
      double product = 0, sum = 0;
      for (int64_t i = chunks.starts[s]; i < chunks.starts[s + 1]; ++i) {
        product += parts[i * 2 * channels + c];
        sum += parts[(i * 2 + 1) * channels + c];
      }
      b.products[at] = static_cast<A>(product / std::sqrt(double(b.var[at]) + double(b.eps)));
      b.sums[at] = static_cast<A>(sum);
    }
  }
}

template <typename T>
void backward_rows(const SplitBackward<T>& b) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const int64_t channels = b.problem.channels, values = b.problem.splits() * channels;
  const Chunks chunks(b.problem, sizeof(T));
  if (!b.has_means) row_sums(b, chunks);
  if (!b.grad_input) return;
  Scratch<A> of_grad(values), of_input(values), shifts(values);
  for (int64_t at = 0; at < values; ++at) {
    const double count = b.has_means ? 1 : b.problem.count(at / channels);
    const Pullback<A> of = pullback(b, at, b.products[at] / count, b.sums[at] / count);
    of_grad[at] = of.of_grad;
    of_input[at] = of.of_input;
    shifts[at] = of.shift;
  }
  chunks.each(!b.has_means, [&](int64_t i) {
    const auto& [split, rows] = chunks.chunks[i];
    const int64_t at = split * channels;
    each_group(rows, [&](int64_t row, auto count) __attribute__((always_inline)) {
      const T *g = b.grad + row * channels, *x = b.input + row * channels;
      T* to = b.grad_input + row * channels;
      each_channels<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const V center = load(b.mean + at + c, lanes), of_g = load(of_grad.data() + at + c, lanes),
                of_x = load(of_input.data() + at + c, lanes), shift = load(shifts.data() + at + c, lanes);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t j = r * channels + c;
          const V centered = load(x + j, lanes) - center;
          store(to + j, multiply_add(load(g + j, lanes), of_g, multiply_add(centered, of_x, shift)), lanes);
        }
      });
    });
  });
}
