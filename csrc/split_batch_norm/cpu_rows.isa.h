// channels_last: pixels are rows of channels. One sweep over the rows takes sums of all channels, the next one writes.

// Rows after which deviations are taken from a new mean, and bytes of such groups whose sums are merged in double.
constexpr int64_t kGroup = 64, kChunkBytes = 1 << 17;
// Rows whose mean is the first one.
constexpr int64_t kFew = 8;

// The processor prefetches within pages: rows of so many bytes or more are read side by side, shorter ones in the order
// of memory.
constexpr int64_t kPageBytes = 1 << 12;

// Calls body(c, lanes) for each vector of channels, each channel once.
template <int64_t size, typename Body>
PAPER_LAYERS_INLINE void each_channels(int64_t channels, Body&& body) {
  int64_t c = 0;
  for (; c + size <= channels; c += size) body(c, Full{});
  if (c < channels) body(c, channels - c);
}

// Calls body(row, number of rows) for blocks of rows of so many bytes.
template <typename Body>
PAPER_LAYERS_INLINE void each_row_block(Range rows, int64_t bytes, const Body& body) {
  int64_t r = rows.begin;
  for (; bytes >= kPageBytes && r + 8 <= rows.end; r += 8) body(r, std::integral_constant<int, 8>());
  for (; r < rows.end; ++r) body(r, std::integral_constant<int, 1>());
}

// The rows of each split in chunks. Their number does not depend on the threads, so results do not either.
struct Chunks {
  struct Chunk {
    int64_t split;
    Range rows;
  };
  std::vector<Chunk> chunks;

  Chunks(const SplitBatchNormProblem& problem, int64_t element_size) {
    const int64_t groups = kChunkBytes / (problem.channels * element_size * kGroup);
    const int64_t step = std::max<int64_t>(1, groups) * kGroup;
    for (int64_t s = 0; s < problem.splits(); ++s) {
      const int64_t end = problem.starts[s + 1] * problem.pixels;
      for (int64_t r = problem.starts[s] * problem.pixels; r < end; r += step) {
        chunks.push_back({s, {r, std::min(r + step, end)}});
      }
    }
  }
  int64_t size() const { return static_cast<int64_t>(chunks.size()); }

  template <typename Body>
  void each(const Body& body) const {
    parallel_for(0, size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

  // Calls body(chunk, its index, channels) for each chunk in turn, ranges of channels in parallel.
  template <typename Body>
  void each_in_turn(int64_t channels, const Body& body) const {
    parallel_for(0, channels, 1 + 65536 / (1 + size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < size(); ++i) body(chunks[i], i, Range{begin, end});
    });
  }
};

// The sums of some rows for each channel.
template <typename A>
struct RowMoments {
  // The mean, which deviations are taken from, what its rounding leaves, and the sum of squared deviations.
  A *means, *rests, *squares;
  A *sums, *products;  // of the rows at hand; zero before and after
};

// Deviations are from the mean of the rows before, at first from the mean of a few rows: sums lose digits neither to a
// common offset nor to a first row that is far from all others.
template <typename T>
void add_moments(const T* input, int64_t rows, int64_t channels, RowMoments<Accumulator<T>> of) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const int64_t few = std::min(rows, kFew);
  each_channels<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    const V first = load(input + c, lanes);
    V sum(A(0));
    for (int64_t r = 1; r < few; ++r) sum = sum + (load(input + r * channels + c, lanes) - first);
    store(of.means + c, multiply_add(sum, V(A(1) / A(few)), first), lanes);
  });
  for (int64_t first = 0; first < rows; first += kGroup) {
    const int64_t end = std::min(rows, first + kGroup);
    const auto add = [&](int64_t r, auto block) __attribute__((always_inline)) {
      const T* x = input + r * channels;
      each_channels<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const V mean = load(of.means + c, lanes);
        V sum = load(of.sums + c, lanes), product = load(of.products + c, lanes);
        for (int64_t i = 0; i < block; ++i) {
          const V deviation = load(x + i * channels + c, lanes) - mean;
          sum = sum + deviation;
          product = multiply_add(deviation, deviation, product);
        }
        store(of.sums + c, sum, lanes);
        store(of.products + c, product, lanes);
      });
    };
    each_row_block({first, end}, channels * sizeof(T), add);
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
  const int64_t channels = f.problem.channels, values = f.problem.splits() * channels;
  Scratch<A> parts(chunks.size() * 3 * channels);
  chunks.each([&](int64_t i) {
    const Range rows = chunks.chunks[i].rows;
    A* means = parts.data() + i * 3 * channels;
    Scratch<A> sums(2 * channels);
    add_moments(f.input + rows.begin * channels, rows.size(), channels,
                {means, means + channels, means + 2 * channels, sums.data(), sums.data() + channels});
  });
  Scratch<double> means(values), squares(values);
  chunks.each_in_turn(channels, [&](const Chunks::Chunk& chunk, int64_t i, Range of) {
    // Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983.
    const int64_t before = chunk.rows.begin - f.problem.starts[chunk.split] * f.problem.pixels;
    const double share = double(chunk.rows.size()) / (before + chunk.rows.size()), weight = before * share;
    const A* part = parts.data() + i * 3 * channels;
    double *mean = means.data() + chunk.split * channels, *square = squares.data() + chunk.split * channels;
    for (int64_t c = of.begin; c < of.end; ++c) {
      const double delta = double(part[c]) + double(part[channels + c]) - mean[c];
      mean[c] += delta * share;
      square[c] += double(part[2 * channels + c]) + delta * delta * weight;
    }
  });
  for (int64_t at = 0; at < values; ++at) {
    f.mean[at] = static_cast<A>(means[at]);
    f.var[at] = static_cast<A>(squares[at] / double(std::max<int64_t>(f.problem.count(at / channels), 1)));
    rests[at] = static_cast<A>(means[at] - double(f.mean[at]));
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
  chunks.each([&](int64_t i) {
    const Chunks::Chunk& chunk = chunks.chunks[i];
    with_store(f.output, channels, f.problem.elements(), [&](auto write) {
      const int64_t at = chunk.split * channels;
      const A *centers = f.mean + at, *scale = scales.data() + at, *shift = shifts.data() + at;
      for (int64_t r = chunk.rows.begin; r < chunk.rows.end; ++r) {
        const T* x = f.input + r * channels;
        T* y = f.output + r * channels;
        cover<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
          const V centered = load(x + c, lanes) - load(centers + c, lanes);
          write(y + c, multiply_add(centered, load(scale + c, lanes), load(shift + c, lanes)), lanes);
        });
      }
    });
  });
}

// Sums over each split of grad times the normalised input, and of grad.
template <typename T>
void row_sums(const SplitBackward<T>& b, const Chunks& chunks) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const int64_t channels = b.problem.channels, values = b.problem.splits() * channels;
  Scratch<A> parts(chunks.size() * 2 * channels);
  chunks.each([&](int64_t i) {
    const auto& [split, rows] = chunks.chunks[i];
    const A* centers = b.mean + split * channels;
    A *products = parts.data() + i * 2 * channels, *sums = products + channels;
    const auto add = [&](int64_t r, auto block) __attribute__((always_inline)) {
      const int64_t first = r * channels;
      each_channels<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const V center = load(centers + c, lanes);
        V product = load(products + c, lanes), sum = load(sums + c, lanes);
        for (int64_t j = first + c; j < first + block * channels; j += channels) {
          const V grad = load(b.grad + j, lanes);
          sum = sum + grad;
          product = multiply_add(grad, load(b.input + j, lanes) - center, product);
        }
        store(products + c, product, lanes);
        store(sums + c, sum, lanes);
      });
    };
    each_row_block(rows, channels * sizeof(T), add);
  });
  Scratch<double> totals(2 * values);
  chunks.each_in_turn(channels, [&](const Chunks::Chunk& chunk, int64_t i, Range of) {
    const A* part = parts.data() + i * 2 * channels;
    double *products = totals.data() + chunk.split * channels, *sums = products + values;
    for (int64_t c = of.begin; c < of.end; ++c) {
      products[c] += double(part[c]);
      sums[c] += double(part[channels + c]);
    }
  });
  for (int64_t at = 0; at < values; ++at) {
    b.products[at] = static_cast<A>(totals[at] / std::sqrt(double(b.var[at]) + double(b.eps)));
    b.sums[at] = static_cast<A>(totals[values + at]);
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
    const double count = b.has_means ? 1 : std::max<int64_t>(b.problem.count(at / channels), 1);
    const Pullback<A> of = pullback(b, at, b.products[at] / count, b.sums[at] / count);
    of_grad[at] = of.of_grad;
    of_input[at] = of.of_input;
    shifts[at] = of.shift;
  }
  chunks.each([&](int64_t i) {
    const Chunks::Chunk& chunk = chunks.chunks[i];
    with_store(b.grad_input, channels, b.problem.elements(), [&](auto write) {
      const int64_t at = chunk.split * channels;
      for (int64_t r = chunk.rows.begin; r < chunk.rows.end; ++r) {
        const T *g = b.grad + r * channels, *x = b.input + r * channels;
        T* to = b.grad_input + r * channels;
        cover<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
          const V centered = load(x + c, lanes) - load(b.mean + at + c, lanes);
          const V factor = load(of_input.data() + at + c, lanes), shift = load(shifts.data() + at + c, lanes);
          const V result = multiply_add(centered, factor, shift);
          write(to + c, multiply_add(load(g + c, lanes), load(of_grad.data() + at + c, lanes), result), lanes);
        });
      }
    });
  });
}
