// channels_last: pixels are rows of channels. One sweep over the rows takes sums of all channels, the next one writes.
// Some rows side by side may be read as one wide row, of whole vectors: a lane for each of them and each channel.

// Rows after which deviations are taken from a new mean, and bytes of such groups whose sums are merged in double.
constexpr int64_t kGroup = 64, kChunkBytes = 1 << 17;
// Rows whose mean is the first one.
constexpr int64_t kFew = 8;

// Rows are read side by side, so that their sums stay in registers. Two tensors from memory are read in its order,
// unless their rows are as long as a page, within which the processor prefetches.
constexpr int64_t kPageBytes = 1 << 12, kCachedBytes = 1 << 22;

// Calls body(c, lanes) for each vector of channels, each channel once.
template <int64_t size, typename Body>
PAPER_LAYERS_INLINE void each_channels(int64_t channels, Body&& body) {
  int64_t c = 0;
  for (; c + size <= channels; c += size) body(c, Full{});
  if (c < channels) body(c, channels - c);
}

// Calls body(row, number of rows) for blocks of rows.
template <typename Body>
PAPER_LAYERS_INLINE void each_row_block(Range rows, bool side_by_side, const Body& body) {
  int64_t r = rows.begin;
  for (; side_by_side && r + 8 <= rows.end; r += 8) body(r, std::integral_constant<int, 8>());
  for (; r < rows.end; ++r) body(r, std::integral_constant<int, 1>());
}

// The wide rows are several vectors, where a chunk then has a few of them: what the lanes sum is merged in double.
constexpr int64_t kWideVectors = 4, kFewWideRows = 16;

template <int64_t size>
int64_t rows_of_wide_row(const SplitBatchNormProblem& problem) {
  const int64_t rows = problem.images() * problem.pixels / std::max<int64_t>(1, problem.splits());
  int64_t fold = size;
  for (int64_t c = problem.channels; fold > 1 && c % 2 == 0; c /= 2) fold /= 2;
  if (rows < kFewWideRows * fold) return 1;
  while (fold * problem.channels < kWideVectors * size && rows >= 2 * kFewWideRows * fold) fold *= 2;
  return fold;
}

// The rows of each split in chunks. Their number does not depend on the threads, so results do not either.
struct Chunks {
  struct Chunk {
    int64_t split;
    Range rows;
  };
  std::vector<Chunk> chunks;
  int64_t fold, width, grain;  // Rows of a wide row, its lanes, and chunks that are worth a thread.

  Chunks(const SplitBatchNormProblem& problem, int64_t element_size, int64_t fold)
      : fold(fold), width(fold * problem.channels) {
    const int64_t groups = kChunkBytes / (width * element_size * kGroup);
    const int64_t step = std::max<int64_t>(1, groups) * kGroup * fold;
    for (int64_t s = 0; s < problem.splits(); ++s) {
      const int64_t end = problem.starts[s + 1] * problem.pixels;
      for (int64_t r = problem.starts[s] * problem.pixels; r < end; r += step) {
        chunks.push_back({s, {r, std::min(r + step, end)}});
      }
    }
    grain = grain_size(16384, {problem.elements() / std::max<int64_t>(1, size())});
  }
  int64_t size() const { return static_cast<int64_t>(chunks.size()); }

  // The values of splits and channels for each lane: (S, width).
  template <typename A>
  const A* lanes(const A* values, int64_t splits, Scratch<A>& memory) const {
    if (fold == 1) return values;
    const int64_t channels = width / fold;
    memory.resize(splits * width);
    A* to = memory.data();
    for (int64_t s = 0; s < splits; ++s) {
      for (int64_t i = 0; i < fold; ++i) to = std::copy_n(values + s * channels, channels, to);
    }
    return memory.data();
  }

  // Calls body(element, lanes) for each wide row of a chunk, and for what is left of it.
  template <typename Body>
  PAPER_LAYERS_INLINE void each_wide_row(Range rows, const Body& body) const {
    const int64_t channels = width / fold, end = rows.end * channels;
    int64_t i = rows.begin * channels;
    for (; i + width <= end; i += width) body(i, width);
    if (i < end) body(i, end - i);
  }

  template <typename Body>
  void each(const Body& body) const {
    parallel_for(0, size(), grain, [&](int64_t begin, int64_t end) {
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
    each_row_block({first, end}, true, add);
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
  const int64_t channels = f.problem.channels, values = f.problem.splits() * channels, width = chunks.width;
  Scratch<A> parts(chunks.size() * 3 * width);
  chunks.each([&](int64_t i) {
    const Range rows = chunks.chunks[i].rows;
    A* means = parts.data() + i * 3 * width;
    Scratch<A> sums(2 * width);
    add_moments(f.input + rows.begin * channels, rows.size() / chunks.fold, width,
                {means, means + width, means + 2 * width, sums.data(), sums.data() + width});
  });
  // Means are relative to the first one that is merged: sums of small numbers, even if all values have a common offset.
  Scratch<double> origins(values), means(values), squares(values);
  chunks.each_in_turn(channels, [&](const Chunks::Chunk& chunk, int64_t i, Range of) {
    double *origin = origins.data() + chunk.split * channels, *mean = means.data() + chunk.split * channels;
    double* square = squares.data() + chunk.split * channels;
    double before = double(chunk.rows.begin - f.problem.starts[chunk.split] * f.problem.pixels);
    // Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983.
    const auto merge = [&](double count, auto part) __attribute__((always_inline)) {
      const double share = count / (before + count), weight = before * share;
      for (int64_t c = of.begin; c < of.end; ++c) {
        const auto [part_mean, part_rest, part_square] = part(c);
        if (before == 0) origin[c] = part_mean;
        const double delta = part_mean - origin[c] + part_rest - mean[c];
        mean[c] += delta * share;
        square[c] += part_square + delta * delta * weight;
      }
      before += count;
    };
    const int64_t rows = chunk.rows.size() / chunks.fold;
    for (int64_t row = 0; row < chunks.fold && rows > 0; ++row) {
      const A* part = parts.data() + i * 3 * width + row * channels;
      merge(rows, [&](int64_t c) __attribute__((always_inline)) {
        return std::array<double, 3>{double(part[c]), double(part[width + c]), double(part[2 * width + c])};
      });
    }
    for (int64_t row = chunk.rows.begin + rows * chunks.fold; row < chunk.rows.end; ++row) {
      const T* x = f.input + row * channels;
      merge(1, [&](int64_t c) __attribute__((always_inline)) { return std::array<double, 3>{double(A(x[c])), 0, 0}; });
    }
  });
  for (int64_t at = 0; at < values; ++at) {
    f.mean[at] = static_cast<A>(origins[at] + means[at]);
    f.var[at] = static_cast<A>(squares[at] / double(std::max<int64_t>(f.problem.count(at / channels), 1)));
    rests[at] = static_cast<A>(origins[at] - double(f.mean[at]) + means[at]);
  }
}

template <typename T>
void forward_rows(const SplitForward<T>& f) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const int64_t channels = f.problem.channels, values = f.problem.splits() * channels;
  const Chunks chunks(f.problem, sizeof(T), rows_of_wide_row<V::size>(f.problem));
  Scratch<A> rests(values), scales(values), shifts(values);
  if (!f.has_statistics) row_moments(f, chunks, rests.data());
  if (!f.output) return;
  for (int64_t at = 0; at < values; ++at) {
    const Affine<A> affine = normalization(f, at, double(f.mean[at]) + double(rests[at]));
    scales[at] = affine.scale;
    shifts[at] = affine.shift;
  }
  Scratch<A> memory[3];
  const int64_t splits = f.problem.splits();
  const A* all_centers = chunks.lanes<A>(f.mean, splits, memory[0]);
  const A* all_scales = chunks.lanes<A>(scales.data(), splits, memory[1]);
  const A* all_shifts = chunks.lanes<A>(shifts.data(), splits, memory[2]);
  chunks.each([&](int64_t i) {
    const Chunks::Chunk& chunk = chunks.chunks[i];
    with_store(f.output, chunks.width, f.problem.elements(), [&](auto write) {
      const int64_t at = chunk.split * chunks.width;
      const A *centers = all_centers + at, *scale = all_scales + at, *shift = all_shifts + at;
      chunks.each_wide_row(chunk.rows, [&](int64_t first, int64_t width) __attribute__((always_inline)) {
        const T* x = f.input + first;
        T* y = f.output + first;
        cover<V::size>(width, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
          const V centered = load(x + c, lanes) - load(centers + c, lanes);
          write(y + c, multiply_add(centered, load(scale + c, lanes), load(shift + c, lanes)), lanes);
        });
      });
    });
  });
}

// Sums over each split of grad times the normalised input, and of grad.
template <typename T>
void row_sums(const SplitBackward<T>& b, const Chunks& chunks) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const int64_t channels = b.problem.channels, values = b.problem.splits() * channels, width = chunks.width;
  Scratch<A> parts(chunks.size() * 2 * width), memory;
  const A* all_centers = chunks.lanes<A>(b.mean, b.problem.splits(), memory);
  const int64_t bytes = sizeof(T);
  const bool side_by_side = width * bytes >= kPageBytes || b.problem.elements() * bytes <= kCachedBytes;
  chunks.each([&](int64_t i) {
    const auto& [split, rows] = chunks.chunks[i];
    const A* centers = all_centers + split * width;
    A *products = parts.data() + i * 2 * width, *sums = products + width;
    const auto add = [&](int64_t r, auto block) __attribute__((always_inline)) {
      const int64_t first = rows.begin * channels + r * width;
      each_channels<V::size>(width, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const V center = load(centers + c, lanes);
        V product = load(products + c, lanes), sum = load(sums + c, lanes);
        for (int64_t j = first + c; j < first + block * width; j += width) {
          const V grad = load(b.grad + j, lanes);
          sum = sum + grad;
          product = multiply_add(grad, load(b.input + j, lanes) - center, product);
        }
        store(products + c, product, lanes);
        store(sums + c, sum, lanes);
      });
    };
    each_row_block({0, rows.size() / chunks.fold}, side_by_side, add);
  });
  Scratch<double> totals(2 * values);
  chunks.each_in_turn(channels, [&](const Chunks::Chunk& chunk, int64_t i, Range of) {
    double *products = totals.data() + chunk.split * channels, *sums = products + values;
    for (int64_t row = 0; row < chunks.fold; ++row) {
      const A* part = parts.data() + i * 2 * width + row * channels;
      for (int64_t c = of.begin; c < of.end; ++c) {
        products[c] += double(part[c]);
        sums[c] += double(part[width + c]);
      }
    }
    const A* centers = b.mean + chunk.split * channels;
    for (int64_t row = chunk.rows.end - chunk.rows.size() % chunks.fold; row < chunk.rows.end; ++row) {
      const T *g = b.grad + row * channels, *x = b.input + row * channels;
      for (int64_t c = of.begin; c < of.end; ++c) {
        products[c] += double(A(g[c])) * double(A(x[c]) - centers[c]);
        sums[c] += double(A(g[c]));
      }
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
  const Chunks chunks(b.problem, sizeof(T), rows_of_wide_row<V::size>(b.problem));
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
  Scratch<A> memory[4];
  const int64_t splits = b.problem.splits();
  const A* all_centers = chunks.lanes<A>(b.mean, splits, memory[0]);
  const A* all_of_grad = chunks.lanes<A>(of_grad.data(), splits, memory[1]);
  const A* all_of_input = chunks.lanes<A>(of_input.data(), splits, memory[2]);
  const A* all_shifts = chunks.lanes<A>(shifts.data(), splits, memory[3]);
  chunks.each([&](int64_t i) {
    const Chunks::Chunk& chunk = chunks.chunks[i];
    with_store(b.grad_input, chunks.width, b.problem.elements(), [&](auto write) {
      const int64_t at = chunk.split * chunks.width;
      const A *centers = all_centers + at, *grad_factors = all_of_grad + at, *factors = all_of_input + at;
      const A* of_shift = all_shifts + at;
      chunks.each_wide_row(chunk.rows, [&](int64_t first, int64_t width) __attribute__((always_inline)) {
        const T *g = b.grad + first, *x = b.input + first;
        T* to = b.grad_input + first;
        cover<V::size>(width, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
          const V centered = load(x + c, lanes) - load(centers + c, lanes);
          const V result = multiply_add(centered, load(factors + c, lanes), load(of_shift + c, lanes));
          write(to + c, multiply_add(load(g + c, lanes), load(grad_factors + c, lanes), result), lanes);
        });
      });
    });
  });
}
