// The norm that follows EdgeConv's edge pass on the CPU, compiled once for each instruction set.

inline bool has_edge(const EdgeConvProblem& problem, const int64_t* index, int64_t node) {
  const int64_t* const columns = index + node * problem.k;
  return std::any_of(columns, columns + problem.k, [](int64_t row) { return row >= 0; });
}

// (x - mean) factor + bias for each node's kept edge; 0 where there is none.
template <typename T>
void normalize_edges(const EdgeConvProblem& problem, const int64_t* index, const EdgeNorm<Accumulator<T>>& norm,
                     const T* extreme, T* output) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const int64_t channels = problem.channels;
  Scratch<A> factor(channels), bias(channels);
  for (int64_t c = 0; c < channels; ++c) {
    factor[c] = norm.factor(c);
    bias[c] = norm.bias != nullptr ? norm.bias[c] : A(0);
  }
  parallel_for(0, problem.nodes, grain_size(65536, {channels}), [&](int64_t begin, int64_t end) {
    for (int64_t node = begin; node < end; ++node) {
      T* const to = output + node * channels;
      if (!has_edge(problem, index, node)) {
        std::fill_n(to, channels, T(0));
        continue;
      }
      cover<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const V deviation = V(load(extreme + node * channels + c, lanes)) - V(load(norm.mean + c, lanes));
        store(to + c, multiply_add(deviation, V(load(factor.data() + c, lanes)), V(load(bias.data() + c, lanes))), lanes);
      });
    }
  });
}

// The gradients of the norm's parameters and statistics, from blocks of nodes that are added in order.
template <typename T>
void normalize_edges_backward(const EdgeConvProblem& problem, const int64_t* index,
                              const EdgeNorm<Accumulator<T>>& norm, const T* grad, const T* extreme,
                              const EdgeNormGradients<Accumulator<T>>& to) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const int64_t channels = problem.channels, blocks = (problem.nodes + kNodeBlock - 1) / kNodeBlock;
  std::vector<double> sums(blocks * 2 * channels);
  parallel_for(0, blocks, grain_size(65536, {kNodeBlock, channels}), [&](int64_t begin, int64_t end) {
    Scratch<A> total(channels), product(channels);
    for (int64_t b = begin; b < end; ++b) {
      std::fill(total.begin(), total.end(), A(0));
      std::fill(product.begin(), product.end(), A(0));
      for (int64_t node = b * kNodeBlock; node < std::min(problem.nodes, (b + 1) * kNodeBlock); ++node) {
        if (!has_edge(problem, index, node)) continue;
        for_each_group<V::size, 1>(0, channels, [&](int64_t c, auto lanes, auto) __attribute__((always_inline)) {
          const int64_t at = node * channels + c;
          const V g = load(grad + at, lanes), deviation = V(load(extreme + at, lanes)) - V(load(norm.mean + c, lanes));
          A *const t = total.data() + c, *const p = product.data() + c;
          store(t, V(load(t, lanes)) + g, lanes);
          store(p, multiply_add(g, deviation, V(load(p, lanes))), lanes);
        });
      }
      std::copy(total.begin(), total.end(), sums.begin() + b * 2 * channels);
      std::copy(product.begin(), product.end(), sums.begin() + (b * 2 + 1) * channels);
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0, product = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      total += sums[b * 2 * channels + c];
      product += sums[(b * 2 + 1) * channels + c];
    }
    to.set(norm, c, total, product);
  }
}
