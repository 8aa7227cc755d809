// NCHW: a channel of a split is read from memory once, and the later passes find it in the cache.

// Elements whose sums are taken in vectors, small enough for the first cache.
constexpr int64_t kBlock = 4096;

// Planes of fewer bytes are over before the processor begins to prefetch.
constexpr int64_t kShortBytes = 512;

// The rest of a plane after whole vectors: its last vector with the lanes that are new, or less than a vector.
template <typename A>
struct Rest {
  using V = Vec<A>;
  int64_t offset, count;
  typename V::BitLanes fresh;

  explicit Rest(int64_t length) {
    const int64_t rest = length % V::size;
    const bool overlaps = length >= V::size;
    offset = overlaps ? length - V::size : 0;
    count = rest == 0 ? 0 : overlaps ? V::size : rest;
    for (int64_t i = 0; i < V::size; ++i) fresh[i] = (overlaps ? i >= V::size - rest : i < rest) ? -1 : 0;
  }
  PAPER_LAYERS_INLINE V only(V v) const { return V(fresh ? v.lanes : typename V::Lanes{}); }
};

template <typename T, typename A>
PAPER_LAYERS_INLINE Vec<A> load(const T* p, const Rest<A>& rest) {
  return rest.count == Vec<A>::size ? load(p) : load(p, rest.count);
}
template <typename V>
PAPER_LAYERS_INLINE V kept(V v, Full) {
  return v;
}
template <typename A>
PAPER_LAYERS_INLINE Vec<A> kept(Vec<A> v, const Rest<A>& rest) {
  return rest.only(v);
}

// Calls body(offset, lanes, slot) for each vector of a plane: four in turn have slots of their own, so that sums do not
// wait for one another.
template <typename A, typename Body>
PAPER_LAYERS_INLINE void each_vector(int64_t length, const Rest<A>& rest, Body&& body) {
  constexpr int64_t V = Vec<A>::size;
  int64_t i = 0;
  for (; i + 4 * V <= length; i += 4 * V) {
    body(i, Full{}, 0);
    body(i + V, Full{}, 1);
    body(i + 2 * V, Full{}, 2);
    body(i + 3 * V, Full{}, 3);
  }
  for (; i + V <= length; i += V) body(i, Full{}, 0);
  if (rest.count > 0) body(rest.offset, rest, 1);
}

template <typename A>
PAPER_LAYERS_INLINE double total_of_slots(const Vec<A> (&v)[4]) {
  return total_of(((v[0] + v[1]) + (v[2] + v[3])).lanes);
}

// Calls body(first, planes, length, rest) for blocks of a split's planes of a channel.
template <typename A, typename Body>
PAPER_LAYERS_INLINE void each_block(const SplitBatchNormProblem& problem, int64_t split, int64_t channel, Body&& body) {
  if (problem.count(split) == 0) return;
  const int64_t pixels = problem.pixels, stride = problem.channels * pixels;
  const int64_t step = std::max<int64_t>(1, kBlock / pixels);
  const Rest<A> whole(std::min(pixels, kBlock)), last(pixels % kBlock);
  for (int64_t n = problem.starts[split]; n < problem.starts[split + 1]; n += step) {
    const int64_t first = n * stride + channel * pixels;
    const int64_t planes = std::min(step, problem.starts[split + 1] - n);
    int64_t i = 0;
    for (; i + kBlock <= pixels; i += kBlock) body(first + i, planes, kBlock, whole);
    if (i < pixels) body(first + i, planes, pixels - i, pixels < kBlock ? whole : last);
  }
}

// Asks for the plane behind a short one: it is the next channel's.
template <typename T>
PAPER_LAYERS_INLINE void prefetch_next(const T* plane, int64_t length) {
  if (length * int64_t(sizeof(T)) >= kShortBytes) return;
  for (int64_t i = 0; i < length; i += 64 / sizeof(T)) __builtin_prefetch(plane + length + i);
}

// Mean and sum of squared deviations of some values; sums of parts are merged in double.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983.
  void merge(double other_count, double other_mean, double other_squares) {
    const double total = count + other_count, delta = other_mean - mean;
    mean += delta * (other_count / total);
    squares += other_squares + delta * delta * (count * other_count / total);
    count = total;
  }
};

template <typename T>
Moments plane_moments(const SplitBatchNormProblem& problem, const T* input, int64_t split, int64_t channel) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  if (problem.count(split) == 0) return {};
  const int64_t stride = problem.channels * problem.pixels;
  // Relative to one of the values, sums lose no digits to an offset that all have.
  const A origin = static_cast<A>(input[problem.starts[split] * stride + channel * problem.pixels]);
  Moments moments;
  each_block<A>(problem, split, channel, [&](int64_t first, int64_t planes, int64_t length, const Rest<A>& rest) {
    const double count = planes * length;
    V sums[4] = {V(A(0)), V(A(0)), V(A(0)), V(A(0))};
    for (int64_t n = 0; n < planes; ++n) {
      const T* x = input + first + n * stride;
      prefetch_next(x, length);
      each_vector(length, rest, [&](int64_t i, auto lanes, int slot) __attribute__((always_inline)) {
        sums[slot] = sums[slot] + kept(load(x + i, lanes) - V(origin), lanes);
      });
    }
    const A mean = static_cast<A>(total_of_slots(sums) / count);
    V rests[4] = {V(A(0)), V(A(0)), V(A(0)), V(A(0))}, squares[4] = {V(A(0)), V(A(0)), V(A(0)), V(A(0))};
    for (int64_t n = 0; n < planes; ++n) {
      const T* x = input + first + n * stride;
      each_vector(length, rest, [&](int64_t i, auto lanes, int slot) __attribute__((always_inline)) {
        const V deviation = kept(load(x + i, lanes) - V(origin) - V(mean), lanes);
        rests[slot] = rests[slot] + deviation;
        squares[slot] = multiply_add(deviation, deviation, squares[slot]);
      });
    }
    const double remainder = total_of_slots(rests) / count;
    moments.merge(count, mean + remainder, total_of_slots(squares) - count * remainder * remainder);
  });
  moments.mean += origin;
  return moments;
}

template <typename T>
void normalize_planes(const SplitForward<T>& f, int64_t split, int64_t channel, Affine<Accumulator<T>> affine) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const int64_t pixels = f.problem.pixels;
  const V center(affine.center), scale(affine.scale), shift(affine.shift);
  with_store(f.output, pixels, f.problem.elements(), [&](auto write) {
    for (int64_t n = f.problem.starts[split]; n < f.problem.starts[split + 1]; ++n) {
      const int64_t first = (n * f.problem.channels + channel) * pixels;
      cover<V::size>(pixels, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const V x = load(f.input + first + i, lanes);
        write(f.output + first + i, multiply_add(x - center, scale, shift), lanes);
      });
    }
  });
}

// Calls body(split, channel, index of both) in parallel.
template <typename Body>
void each_channel(const SplitBatchNormProblem& problem, const Body& body) {
  const int64_t values = 1 + problem.images() * problem.pixels / std::max<int64_t>(1, problem.splits());
  parallel_for(0, problem.splits() * problem.channels, 1 + 32768 / values,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t at = begin; at < end; ++at) {
                                  body(at / problem.channels, at % problem.channels, at);
                                }
                              });
}

template <typename T>
void forward_planes(const SplitForward<T>& f) {
  using A = Accumulator<T>;
  each_channel(f.problem, [&](int64_t split, int64_t channel, int64_t at) {
    double mean = f.has_statistics ? double(f.mean[at]) : 0;
    if (!f.has_statistics) {
      const Moments moments = plane_moments(f.problem, f.input, split, channel);
      mean = moments.mean;
      f.mean[at] = static_cast<A>(mean);
      f.var[at] = static_cast<A>(moments.squares / std::max(moments.count, 1.0));
    }
    if (f.output) normalize_planes(f, split, channel, normalization(f, at, mean));
  });
}

template <typename T>
void backward_planes(const SplitBackward<T>& b) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const SplitBatchNormProblem& problem = b.problem;
  const int64_t stride = problem.channels * problem.pixels;
  each_channel(problem, [&](int64_t split, int64_t channel, int64_t at) {
    const V center(b.mean[at]);
    double mean_product = b.products[at], mean_grad = b.sums[at];
    if (!b.has_means) {
      double products = 0, sums = 0;
      each_block<A>(problem, split, channel, [&](int64_t first, int64_t planes, int64_t length, const Rest<A>& rest) {
        V product[4] = {V(A(0)), V(A(0)), V(A(0)), V(A(0))}, sum[4] = {V(A(0)), V(A(0)), V(A(0)), V(A(0))};
        for (int64_t n = 0; n < planes; ++n) {
          const T *g = b.grad + first + n * stride, *x = b.input + first + n * stride;
          prefetch_next(g, length);
          prefetch_next(x, length);
          each_vector(length, rest, [&](int64_t i, auto lanes, int slot) __attribute__((always_inline)) {
            const V grad = kept(load(g + i, lanes), lanes);
            sum[slot] = sum[slot] + grad;
            product[slot] = multiply_add(grad, kept(load(x + i, lanes) - center, lanes), product[slot]);
          });
        }
        products += total_of_slots(product);
        sums += total_of_slots(sum);
      });
      products /= std::sqrt(double(b.var[at]) + double(b.eps));
      b.products[at] = static_cast<A>(products);
      b.sums[at] = static_cast<A>(sums);
      const double count = std::max<int64_t>(problem.count(split), 1);
      mean_product = products / count;
      mean_grad = sums / count;
    }
    if (!b.grad_input) return;
    const Pullback<A> of = pullback(b, at, mean_product, mean_grad);
    const V of_grad(of.of_grad), of_input(of.of_input), shift(of.shift);
    with_store(b.grad_input, problem.pixels, problem.elements(), [&](auto write) {
      for (int64_t n = problem.starts[split]; n < problem.starts[split + 1]; ++n) {
        const int64_t first = n * stride + channel * problem.pixels;
        cover<V::size>(problem.pixels, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          const V x = load(b.input + first + i, lanes) - center, g = load(b.grad + first + i, lanes);
          write(b.grad_input + first + i, multiply_add(g, of_grad, multiply_add(x, of_input, shift)), lanes);
        });
      }
    });
  });
}
