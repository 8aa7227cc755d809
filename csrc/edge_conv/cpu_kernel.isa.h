// The edge pass of EdgeConv on the CPU, compiled once for each instruction set.

// Vectors of channels that are computed side by side, so that none waits for its own last edge.
constexpr int64_t kGroup = PAPER_LAYERS_VECTOR_BYTES == 64 ? 4 : 2;
// Nodes whose statistics are summed by one thread; fixed, so that results do not depend on the threads.
constexpr int64_t kNodeBlock = 256;
// Edges whose mean is the shift of the variance: sums of squares about it lose no digits.
constexpr int64_t kSample = 256;

// max(z, 0) + slope min(z, 0), NaN for NaN.
template <typename A>
struct LeakyReLU {
  A slope;

  PAPER_LAYERS_INLINE Vec<A> operator()(Vec<A> z) const {
    // No product of zero and infinity.
    const A lowest = slope == 0 ? std::numeric_limits<A>::lowest() : -std::numeric_limits<A>::infinity();
    const Vec<A> below = Vec<A>(slope) * max_or_second(Vec<A>(lowest), z);
    return Vec<A>(z.lanes > 0 ? z.lanes : below.lanes);
  }
};

template <typename A>
PAPER_LAYERS_INLINE bool any_nan(Vec<A> v) {
  return lanes_set(v.lanes != v.lanes) != 0;
}

// Calls body(c, lanes, vectors) for groups of that many vectors of channels, each channel once.
template <int64_t size, int64_t group, typename Body>
PAPER_LAYERS_INLINE void for_each_group(int64_t first, int64_t last, Body&& body) {
  int64_t c = first;
  for (; c + group * size <= last; c += group * size) body(c, Full{}, std::integral_constant<int64_t, group>());
  for (; c + size <= last; c += size) body(c, Full{}, std::integral_constant<int64_t, 1>());
  if (c < last) body(c, last - c, std::integral_constant<int64_t, 1>());
}

template <typename A>
PAPER_LAYERS_INLINE void add_to(double* sums, Vec<A> v, Full) {
  A lanes[v.size];
  store(lanes, v);
  for (int64_t i = 0; i < v.size; ++i) sums[i] += lanes[i];
}
template <typename A>
PAPER_LAYERS_INLINE void add_to(double* sums, Vec<A> v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] += v.lanes[i];
}

// A graph's terms, and the neighbours of the node at hand.
template <typename T>
struct Edges {
  const EdgeConvProblem& problem;
  const T *center, *neighbor;
  const int64_t* index;
  std::vector<int64_t> rows = {};  // where the node's neighbours start

  void select(int64_t node) {
    rows.clear();
    const int64_t start = problem.start(node);
    for (int64_t column = 0; column < problem.k; ++column) {
      const int64_t row = index[node * problem.k + column];
      if (row >= 0) rows.push_back((start + row) * problem.channels);
    }
  }
};

template <typename T>
class Forward {
  using A = Accumulator<T>;
  using V = Vec<A>;

 public:
  Forward(const Edges<T>& edges, A slope, const Kept<A>& kept, bool statistics)
      : edges_(edges),
        channels_(edges.problem.channels),
        activation_{slope},
        statistics_(statistics),
        signs_(channels_),
        shifts_(channels_) {
    for (int64_t c = 0; c < channels_; ++c) signs_[c] = kept.least(c) ? -1 : 1;
    if (statistics) find_shifts();
  }

  void run(T* output, A* mean, A* var) {
    const EdgeConvProblem& problem = edges_.problem;
    const int64_t blocks = (problem.nodes + kNodeBlock - 1) / kNodeBlock;
    const int64_t width = statistics_ ? 2 * channels_ : 0;
    std::vector<double> sums(blocks * width);
    const int64_t grain = grain_size(131072, {kNodeBlock, problem.k, channels_});
    parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      Edges<T> edges = edges_;
      for (int64_t b = begin; b < end; ++b) {
        double* const block = sums.data() + b * width;
        for (int64_t node = b * kNodeBlock; node < std::min(problem.nodes, (b + 1) * kNodeBlock); ++node) {
          edges.select(node);
          if (statistics_) reduce<true>(edges, node, output, block);
          else reduce<false>(edges, node, output, block);
        }
      }
    });
    if (!statistics_) return;
    const double edges = std::max<int64_t>(1, count_edges(problem, edges_.index));
    for (int64_t c = 0; c < channels_; ++c) {
      double sum = 0, square = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        sum += sums[b * width + c];
        square += sums[b * width + channels_ + c];
      }
      const double deviation = sum / edges, variance = square / edges - deviation * deviation;
      mean[c] = static_cast<A>(shifts_[c] + deviation);
      var[c] = static_cast<A>(variance < 0 ? 0 : variance);
    }
  }

 private:
  void find_shifts() {
    const EdgeConvProblem& problem = edges_.problem;
    const int64_t count = problem.nodes * problem.k, step = count / kSample + 1;
    std::vector<double> sums(channels_);
    int64_t found = 0;
    for (int64_t e = 0; e < count; e += step) {
      if (edges_.index[e] < 0) continue;
      ++found;
      const int64_t node = e / problem.k, row = problem.start(node) + edges_.index[e];
      const T *a = edges_.center + node * channels_, *b = edges_.neighbor + row * channels_;
      for_each_group<V::size, 1>(0, channels_, [&](int64_t c, auto lanes, auto) __attribute__((always_inline)) {
        add_to(sums.data() + c, activation_(load(a + c, lanes) + load(b + c, lanes)), lanes);
      });
    }
    for (int64_t c = 0; c < channels_; ++c) {
      const A shift = static_cast<A>(sums[c] / std::max<int64_t>(1, found));
      shifts_[c] = std::isfinite(shift) ? shift : A(0);
    }
  }

  template <bool statistics>
  void reduce(const Edges<T>& edges, int64_t node, T* output, double* block) const {
    if (edges.rows.empty()) {
      std::fill_n(output + node * channels_, channels_, T(0));
      return;
    }
    const auto reduce_group = [&](int64_t c, auto lanes, auto vectors) __attribute__((always_inline)) {
      constexpr int64_t group = decltype(vectors)::value;
      // A product of slope and z below zero, the larger of the two: true up to a slope of one.
      const V slope(activation_.slope);
      const auto plain = [&](V z) __attribute__((always_inline)) { return max_or_second(z, slope * z); };
      const auto larger = [](V y, V best) __attribute__((always_inline)) { return max_or_second(y, best); };
      Totals<group> totals;
      bool regular = activation_.slope <= 1;
      if (regular) totals = sum<statistics, group>(edges, node, c, lanes, plain, larger);
      for (int64_t v = 0; v < group; ++v) regular = regular && !any_nan(totals.sum[v]);
      if (!regular) totals = sum<statistics, group>(edges, node, c, lanes, activation_, larger_or_nan);
      for (int64_t v = 0; v < group; ++v) {
        const int64_t at = c + v * V::size;
        store(output + node * channels_ + at, totals.best[v] * load(signs_.data() + at, lanes), lanes);
        if (!statistics) continue;
        add_to(block + at, totals.sum[v], lanes);
        add_to(block + channels_ + at, totals.square[v], lanes);
      }
    };
    for_each_group<V::size, kGroup>(0, channels_, reduce_group);
  }

  template <int64_t group>
  struct Totals {
    V best[group], sum[group], square[group];  // best of the signed edges; sums about the shift
  };

  static PAPER_LAYERS_INLINE V larger_or_nan(V y, V best) {
    return V(((y.lanes > best.lanes) | (y.lanes != y.lanes)) & (best.lanes == best.lanes) ? y.lanes : best.lanes);
  }

  template <bool statistics, int64_t group, typename Lanes, typename Activation, typename Larger>
  PAPER_LAYERS_INLINE Totals<group> sum(const Edges<T>& edges, int64_t node, int64_t c, Lanes lanes,
                                        Activation activation, Larger larger) const {
    Totals<group> totals;
    V center[group], sign[group], shift[group];
#pragma GCC unroll 4
    for (int64_t v = 0; v < group; ++v) {
      const int64_t at = c + v * V::size;
      center[v] = load(edges.center + node * channels_ + at, lanes);
      sign[v] = load(signs_.data() + at, lanes);
      shift[v] = load(shifts_.data() + at, lanes);
      totals.best[v] = V(-std::numeric_limits<A>::infinity());
      totals.sum[v] = totals.square[v] = V(A(0));
    }
    for (const int64_t row : edges.rows) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < group; ++v) {
        const V y = activation(center[v] + load(edges.neighbor + row + c + v * V::size, lanes));
        totals.best[v] = larger(sign[v] * y, totals.best[v]);
        const V deviation = statistics ? y - shift[v] : y;
        totals.sum[v] = totals.sum[v] + deviation;
        if (statistics) totals.square[v] = multiply_add(deviation, deviation, totals.square[v]);
      }
    }
    return totals;
  }

  const Edges<T>& edges_;
  const int64_t channels_;
  const LeakyReLU<A> activation_;
  const bool statistics_;
  Scratch<A> signs_, shifts_;
};

template <typename T>
void edge_conv(const EdgeConvProblem& problem, const T* center, const T* neighbor, const int64_t* index,
               Accumulator<T> slope, const Kept<Accumulator<T>>& kept, T* output, Accumulator<T>* mean,
               Accumulator<T>* var) {
  const Edges<T> edges{problem, center, neighbor, index};
  Forward<T>(edges, slope, kept, mean != nullptr).run(output, mean, var);
}

// Half types keep edges rounded.
template <typename T, typename V>
PAPER_LAYERS_INLINE V rounded_to(V v) {
  if constexpr (sizeof(T) >= sizeof(float)) return v;
  T half[V::size];
  store(half, v);
  return load(static_cast<const T*>(half));
}

// Gradients. Threads share out the channels: no two write to one element, and each adds in the order of the table.
template <typename T>
struct Backward {
  using A = Accumulator<T>;
  using V = Vec<A>;

  const Edges<T>& edges;
  const T *grad, *output;
  LeakyReLU<A> activation;
  const A *factor, *mean, *constant, *linear;  // an edge's part in the statistics: constant + linear (y - mean)
  T* grad_center;
  A *grad_neighbor, *slopes;

  void run(int64_t first, int64_t last) const {
    const EdgeConvProblem& problem = edges.problem;
    Edges<T> mine = edges;
    for (int64_t row = 0; row < problem.rows; ++row) {
      std::fill(grad_neighbor + row * problem.channels + first, grad_neighbor + row * problem.channels + last, A(0));
    }
    for (int64_t node = 0; node < problem.nodes; ++node) {
      mine.select(node);
      if (node + 1 < problem.nodes) fetch(node + 1, first, last);
      if (mean != nullptr) spread<true>(mine, node, first, last);
      else spread<false>(mine, node, first, last);
    }
  }

 private:
  // Asks for the rows of a node, which may lie anywhere, before their turn.
  void fetch(int64_t node, int64_t first, int64_t last) const {
    const int64_t start = edges.problem.start(node);
    for (int64_t column = 0; column < edges.problem.k; ++column) {
      const int64_t own = edges.index[node * edges.problem.k + column];
      const int64_t row = own < 0 ? 0 : (start + own) * edges.problem.channels;
      for (int64_t c = first; c < last; c += 64 / sizeof(A)) {
        __builtin_prefetch(edges.neighbor + row + c);
        __builtin_prefetch(grad_neighbor + row + c, 1);
      }
    }
  }

  template <bool statistics>
  void spread(const Edges<T>& edges, int64_t node, int64_t first, int64_t last) const {
    constexpr int64_t group = PAPER_LAYERS_VECTOR_BYTES == 64 ? 2 : 1;
    const auto spread_group = [&](int64_t c, auto lanes, auto vectors) __attribute__((always_inline)) {
      bool nan = false;
      for (int64_t v = 0; v < decltype(vectors)::value; ++v) {
        nan = nan || any_nan(V(load(output + node * edges.problem.channels + c + v * V::size, lanes)));
      }
      if (nan) {
        spread<statistics>(edges, node, c, lanes, vectors, [](V y, V kept) __attribute__((always_inline)) {
          return (y.lanes == kept.lanes) | ((y.lanes != y.lanes) & (kept.lanes != kept.lanes));
        });
      } else {
        spread<statistics>(edges, node, c, lanes, vectors,
                           [](V y, V kept) __attribute__((always_inline)) { return y.lanes == kept.lanes; });
      }
    };
    for_each_group<V::size, group>(first, last, spread_group);
  }

  template <bool statistics, typename Lanes, typename Vectors, typename Equal>
  PAPER_LAYERS_INLINE void spread(const Edges<T>& edges, int64_t node, int64_t first, Lanes lanes, Vectors,
                                  Equal equal) const {
    constexpr int64_t group = Vectors::value;
    const int64_t at = node * edges.problem.channels + first;
    const V slope(activation.slope), none(A(0));
    V center[group], kept[group], left[group], sum[group], slanted[group], middle[group], level[group], tilt[group];
#pragma GCC unroll 2
    for (int64_t v = 0; v < group; ++v) {
      const int64_t offset = v * V::size;
      center[v] = load(edges.center + at + offset, lanes);
      kept[v] = load(output + at + offset, lanes);
      left[v] = load(grad + at + offset, lanes);  // goes to the first edge that equals what was kept
      if (factor != nullptr) left[v] = left[v] * V(load(factor + first + offset, lanes));
      sum[v] = slanted[v] = none;
      if (!statistics) continue;
      middle[v] = load(mean + first + offset, lanes);
      level[v] = load(constant + first + offset, lanes);
      tilt[v] = load(linear + first + offset, lanes);
    }
    for (const int64_t row : edges.rows) {
#pragma GCC unroll 2
      for (int64_t v = 0; v < group; ++v) {
        const int64_t c = first + v * V::size;
        const V z = center[v] + load(edges.neighbor + row + c, lanes), y = activation(z);
        const auto chosen = equal(rounded_to<T>(y), kept[v]);
        V part(chosen ? left[v].lanes : none.lanes);
        left[v] = V(chosen ? none.lanes : left[v].lanes);
        if (statistics) part = part + multiply_add(tilt[v], y - middle[v], level[v]);
        const auto positive = z.lanes > 0;
        slanted[v] = multiply_add(part, V(positive ? none.lanes : z.lanes), slanted[v]);
        part = V(positive ? part.lanes : (slope * part).lanes);
        sum[v] = sum[v] + part;
        store(grad_neighbor + row + c, load(grad_neighbor + row + c, lanes) + part, lanes);
      }
    }
#pragma GCC unroll 2
    for (int64_t v = 0; v < group; ++v) {
      const int64_t offset = v * V::size;
      store(grad_center + at + offset, sum[v], lanes);
      store(slopes + first + offset, load(slopes + first + offset, lanes) + slanted[v], lanes);
    }
  }
};

template <typename T>
void edge_conv_backward(const EdgeConvProblem& problem, const T* grad, const EdgeGradients<Accumulator<T>>& gradients,
                        const T* center, const T* neighbor, const int64_t* index, Accumulator<T> slope,
                        const T* output, T* grad_center, Accumulator<T>* grad_neighbor, Accumulator<T>* grad_slope) {
  using A = Accumulator<T>;
  const int64_t channels = problem.channels;
  const Edges<T> edges{problem, center, neighbor, index};
  const double count = std::max<int64_t>(1, count_edges(problem, index));
  const A* const mean = gradients.mean;
  Scratch<A> constant(channels), linear(channels), slopes(channels);
  for (int64_t c = 0; c < (mean != nullptr ? channels : 0); ++c) {
    linear[c] = static_cast<A>(2 * gradients.grad_var[c] / count);
    // An infinite mean leaves no edge a gradient.
    constant[c] = static_cast<A>(gradients.grad_mean[c] / count) + linear[c] * (mean[c] - mean[c]);
  }
  const Backward<T> backward{edges, grad,        output,        {slope},      gradients.factor, mean, constant.data(),
                             linear.data(), grad_center, grad_neighbor, slopes.data()};
  constexpr int64_t line = 64 / sizeof(A);
  parallel_for(0, (channels + line - 1) / line, 1, [&](int64_t begin, int64_t end) {
    backward.run(begin * line, std::min(channels, end * line));
  });
  double total = 0;
  for (const A s : slopes) total += s;
  *grad_slope = static_cast<A>(total);
}

#include "edge_conv/cpu_norm.isa.h"
