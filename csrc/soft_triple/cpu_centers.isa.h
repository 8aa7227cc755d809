// The centers of each class among themselves: lengths, distances, and what these add to gradients.

// Classes that are summed by one thread; fixed, so that results do not depend on the threads.
constexpr int64_t kClassBlock = 32;
// Runs body(first, last) on the blocks of so many classes, each of so many operations.
template <typename Body>
void for_each_block(int64_t classes, int64_t work_per_class, Body&& body) {
  const int64_t blocks = (classes + kClassBlock - 1) / kClassBlock;
  const int64_t grain = grain_size(32768, {kClassBlock, work_per_class});
  parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b * kClassBlock, std::min(classes, (b + 1) * kClassBlock));
  });
}

// The products of the centers of a class (K, K) below the diagonal and in it, or only in it.
template <typename A>
void gram(const SoftTripleCenters& problem, const A* centers, A* to) {
  const int64_t K = problem.centers, channels = problem.channels;
  for (int64_t j = 0; j < K; ++j) {
    const A* row = centers + j * channels;
    int64_t k = problem.distances ? 0 : j;
    for (; k + kGroup <= j + 1; k += kGroup) products<kGroup>(row, centers + k * channels, channels, to + j * K + k);
    for (; k <= j; ++k) products<1>(row, centers + k * channels, channels, to + j * K + k);
  }
}

template <typename A>
void soft_triple_centers(const SoftTripleCenters& problem, const A* centers, A* inverse, A* distance, A* pull) {
  const int64_t K = problem.centers;
  std::vector<double> sums((problem.classes + kClassBlock - 1) / kClassBlock);
  const int64_t work = problem.class_size() * (problem.distances ? K : 1);
  for_each_block(problem.classes, work, [&](int64_t first, int64_t last) {
    std::vector<A> scratch(problem.distances ? 0 : problem.pairs());
    double sum = 0;
    for (int64_t c = first; c < last; ++c) {
      A* products = problem.distances ? pull + c * problem.pairs() : scratch.data();
      gram(problem, centers + c * problem.class_size(), products);
      for (int64_t k = 0; k < K; ++k) inverse[c * K + k] = inverse_length(products[k * K + k]);
      if (problem.distances) sum += distances_of_class(K, inverse + c * K, products);
    }
    sums[first / kClassBlock] = sum;
  });
  *distance = static_cast<A>(std::accumulate(sums.begin(), sums.end(), 0.0));
}

// One class's rows += weights (K, K) times the centers, or only the diagonal of weights.
template <int64_t vectors, typename A, typename Lanes>
PAPER_LAYERS_INLINE void add_products(const SoftTripleCenters& problem, const A* weights, const A* centers, A* rows,
                                      Lanes lanes) {
  using V = Vec<A>;
  const int64_t K = problem.centers;
  for (int64_t j = 0; j < K; ++j) {
    A* const row = rows + j * problem.channels;
    V sums[vectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) sums[v] = load(row + v * V::size, lanes);
    for (int64_t k = problem.distances ? 0 : j; k < (problem.distances ? K : j + 1); ++k) {
      const V weight(weights[j * K + k]);
      const A* center = centers + k * problem.channels;
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) {
        sums[v] = multiply_add(weight, load(center + v * V::size, lanes), sums[v]);
      }
    }
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) store(row + v * V::size, sums[v], lanes);
  }
}

template <typename A>
void soft_triple_add_centers(const SoftTripleCenters& problem, const A* centers, const A* inverse, const A* projection,
                             const A* pull, A grad_distance, A* grad) {
  constexpr int64_t size = Vec<A>::size;
  const int64_t K = problem.centers, channels = problem.channels;
  const int64_t work = problem.class_size() * (problem.distances ? K : 1);
  for_each_block(problem.classes, work, [&](int64_t first, int64_t last) {
    std::vector<A> weights(problem.pairs());
    for (int64_t c = first; c < last; ++c) {
      if (problem.distances) {
        for (int64_t i = 0; i < problem.pairs(); ++i) weights[i] = grad_distance * pull[c * problem.pairs() + i];
      }
      for (int64_t k = 0; k < K; ++k) {
        const A length = inverse[c * K + k], share = projection[c * K + k] * length * length;
        weights[k * K + k] = (problem.distances ? weights[k * K + k] : A(0)) - share;
      }
      const A* from = centers + c * problem.class_size();
      A* to = grad + c * problem.class_size();
      int64_t i = 0;
      for (; i + kGroup * size <= channels; i += kGroup * size) {
        add_products<kGroup>(problem, weights.data(), from + i, to + i, Full{});
      }
      for (; i + size <= channels; i += size) add_products<1>(problem, weights.data(), from + i, to + i, Full{});
      if (i < channels) add_products<1>(problem, weights.data(), from + i, to + i, channels - i);
    }
  });
}

// Vectors (rows, channels) over their lengths.
template <typename A>
void unit_vectors(int64_t rows, int64_t channels, const A* x, A* inverse, A* unit) {
  A distance;
  soft_triple_centers<A>({rows, 1, channels, false}, x, inverse, &distance, nullptr);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < channels; ++c) unit[i * channels + c] = x[i * channels + c] * inverse[i];
  }
}

// Turns gradients of unit vectors into gradients of the vectors.
template <typename A>
void unit_vectors_backward(int64_t rows, int64_t channels, const A* unit, const A* inverse, A* grad) {
  for (int64_t i = 0; i < rows; ++i) {
    const A* const u = unit + i * channels;
    A* const g = grad + i * channels;
    A along;
    products<1>(u, g, channels, &along);
    for (int64_t c = 0; c < channels; ++c) g[c] = (g[c] - along * u[c]) * inverse[i];
  }
}
