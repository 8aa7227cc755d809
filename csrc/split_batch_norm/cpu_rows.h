// channels_last: pixels are rows of channels. One sweep over the rows takes sums of all channels, the next one writes,
// backwards, so that it begins with what the caches still hold. Rows are read in order: side by side at the strides of
// many channels they would fall into the same lines of the caches.

// Rows after which deviations are taken from a new mean, and the rows whose sums are merged in double: so many bytes,
// but of many channels enough rows that merging costs little.
constexpr int64_t kGroup = 16, kChunkBytes = 1 << 17, kMinGroups = 4;

// Calls body(c, lanes) for each vector of channels, each channel once.
template <int64_t size, typename Body>
PAPER_LAYERS_INLINE void each_channels(int64_t channels, Body&& body) {
  int64_t c = 0;
  for (; c + size <= channels; c += size) body(c, Full{});
  if (c < channels) body(c, channels - c);
}

// Calls body(row, number of rows) for pairs of rows, and one that is left.
template <typename Body>
PAPER_LAYERS_INLINE void each_pair(int64_t rows, Body&& body) {
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) body(r, std::integral_constant<int, 2>());
  if (r < rows) body(r, std::integral_constant<int, 1>());
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
    const int64_t groups = kChunkBytes / (problem.channels * element_size * kGroup);
    const int64_t step = std::max(kMinGroups, groups) * kGroup;
    for (int64_t s = 0; s < problem.splits(); ++s) {
      const int64_t end = problem.starts[s + 1] * problem.pixels;
      for (int64_t r = problem.starts[s] * problem.pixels; r < end; r += step) {
        chunks.push_back({s, {r, std::min(r + step, end)}});
      }
      starts.push_back(size());
    }
  }
  int64_t size() const { return static_cast<int64_t>(chunks.size()); }

  // Calls body(value, split, channel) for all values of splits and channels, in parallel.
  template <typename Body>
  void each_value(int64_t channels, const Body& body) const {
    const int64_t splits = static_cast<int64_t>(starts.size()) - 1;
    torch::stable::parallel_for(0, splits * channels, 1 + 65536 / (1 + size()), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) body(at, at / channels, at % channels);
    });
  }

  // The second time, `backwards` for each thread.
  template <typename Body>
  void each(bool backwards, const Body& body) const {
    torch::stable::parallel_for(0, size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(backwards ? begin + end - 1 - i : i);
    });
  }
};

// The sums of some rows for each channel.
template <typename A>
struct RowMoments {
  // The mean, which deviations are taken from, what its rounding leaves, and the sum of squared deviations.
  A *means, *rests, *squares;
  A *sums, *products;  // Of the rows at hand: zero before and after.
};

// Deviations are from the mean of the rows before, at first from the first row: sums lose no digits to an offset that
// all have.
template <typename T>
void add_moments(const T* input, int64_t rows, int64_t channels, const RowMoments<Accumulator<T>>& of) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  std::copy(input, input + channels, of.means);
  for (int64_t first = 0; first < rows; first += kGroup) {
    const int64_t end = std::min(rows, first + kGroup);
    each_pair(end - first, [&](int64_t r, auto pair) __attribute__((always_inline)) {
      const T* x = input + (first + r) * channels;
      each_channels<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const V mean = load(of.means + c, lanes);
        V sum = load(of.sums + c, lanes), product = load(of.products + c, lanes);
        for (int64_t i = 0; i < pair; ++i) {
          const V deviation = load(x + i * channels + c, lanes) - mean;
          sum = sum + deviation;
          product = multiply_add(deviation, deviation, product);
        }
        store(of.sums + c, sum, lanes);
        store(of.products + c, product, lanes);
      });
    });
    const V count(A(end - first)), share(A(1) / A(end)), zero(A(0));
    each_channels<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
      const V mean = load(of.means + c, lanes), rest = load(of.rests + c, lanes), sum = load(of.sums + c, lanes);
      const V from_mean = sum - count * rest, change = from_mean * share, moved = rest + change;
      const V next = mean + moved;
      const V square = load(of.products + c, lanes) - rest * (sum + from_mean) - from_mean * change;
      store(of.means + c, next, lanes);
      store(of.rests + c, moved - (next - mean), lanes);
      store(of.squares + c, load(of.squares + c, lanes) + square, lanes);
      store(of.sums + c, zero, lanes);
      store(of.products + c, zero, lanes);
    });
  }
}

// Mean and variance of each split, and of the mean what its rounding to A leaves.
template <typename T>
void row_moments(const SplitForward<T>& f, const Chunks& chunks, Accumulator<T>* rests) {
  using A = Accumulator<T>;
  const int64_t channels = f.problem.channels;
  Scratch<A> parts(chunks.size() * 3 * channels);
  chunks.each(false, [&](int64_t i) {
    const Range rows = chunks.chunks[i].rows;
    A* means = parts.data() + i * 3 * channels;
    Scratch<A> sums(2 * channels);
    add_moments(f.input + rows.begin * channels, rows.size(), channels,
                {means, means + channels, means + 2 * channels, sums.data(), sums.data() + channels});
  });
  chunks.each_value(channels, [&](int64_t at, int64_t s, int64_t c) {
    Moments moments;
    for (int64_t i = chunks.starts[s]; i < chunks.starts[s + 1]; ++i) {
      const A* part = parts.data() + i * 3 * channels + c;
      moments.merge(chunks.chunks[i].rows.size(), double(part[0]) + double(part[channels]), part[2 * channels]);
    }
    f.mean[at] = static_cast<A>(moments.mean);
    f.var[at] = static_cast<A>(moments.squares / moments.count);
    rests[at] = static_cast<A>(moments.mean - double(f.mean[at]));
  });
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
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const T* x = f.input + r * channels;
      T* y = f.output + r * channels;
      cover<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const V centered = load(x + c, lanes) - load(centers + c, lanes);
        store(y + c, multiply_add(centered, load(scale + c, lanes), load(shift + c, lanes)), lanes);
      });
    }
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
    each_pair(rows.size(), [&, rows = rows](int64_t r, auto pair) __attribute__((always_inline)) {
      const int64_t first = (rows.begin + r) * channels;
      each_channels<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const V center = load(centers + c, lanes);
        V product = load(products + c, lanes), sum = load(sums + c, lanes);
        for (int64_t j = first + c; j < first + pair * channels; j += channels) {
          const V grad = load(b.grad + j, lanes);
          sum = sum + grad;
          product = multiply_add(grad, load(b.input + j, lanes) - center, product);
        }
        store(products + c, product, lanes);
        store(sums + c, sum, lanes);
      });
    });
  });
  chunks.each_value(channels, [&](int64_t at, int64_t s, int64_t c) {
    double product = 0, sum = 0;
    for (int64_t i = chunks.starts[s]; i < chunks.starts[s + 1]; ++i) {
      product += parts[i * 2 * channels + c];
      sum += parts[(i * 2 + 1) * channels + c];
    }
    b.products[at] = static_cast<A>(product / std::sqrt(double(b.var[at]) + double(b.eps)));
    b.sums[at] = static_cast<A>(sum);
  });
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
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const T *g = b.grad + r * channels, *x = b.input + r * channels;
      T* to = b.grad_input + r * channels;
      cover<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const V centered = load(x + c, lanes) - load(b.mean + at + c, lanes);
        const V factor = load(of_input.data() + at + c, lanes), shift = load(shifts.data() + at + c, lanes);
        const V result = multiply_add(centered, factor, shift);
        store(to + c, multiply_add(load(g + c, lanes), load(of_grad.data() + at + c, lanes), result), lanes);
      });
    }
  });
}
