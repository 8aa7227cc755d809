// The gradient of the distances, compiled once for each instruction set.

// sum[c] += weight * (x[c] - y[c]), or weight * x[c]
template <bool difference, typename T>
PAPER_LAYERS_INLINE void accumulate(T weight, const T* x, const T* y, int64_t channels, T* sum) {
  for (int64_t c = 0; c < channels; ++c) sum[c] += weight * (difference ? x[c] - y[c] : x[c]);
}

// Each query gathers from its neighbours, and each point from the queries that it is a neighbour of, in order:
// nothing is written by two threads, and results do not depend on their number.
template <typename T>
void knn_backward(const NeighborTable& table, int64_t channels, bool inner, const T* grad, const T* query,
                  const T* points, T* grad_query, T* grad_points) {
  const int64_t edges = table.queries * table.k;
  std::vector<int64_t> start(table.points + 2), edge_of(edges);
  for (int64_t e = 0; e < edges; ++e) {
    check_row(table.index[e], table.limit());
    const int64_t row = table.row(e);
    if (row >= 0) ++start[row + 2];
  }
  std::partial_sum(start.begin(), start.end(), start.begin());
  for (int64_t e = 0; e < edges; ++e) {
    const int64_t row = table.row(e);
    if (row >= 0) edge_of[start[row + 1]++] = e;
  }
  const int64_t grain = grain_size(32768, {channels, table.k});
  parallel_for(0, table.queries, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* sum = grad_query + i * channels;
      std::fill_n(sum, channels, T(0));
      for (int64_t e = i * table.k; e < (i + 1) * table.k; ++e) {
        if (table.row(e) < 0) continue;
        const T* point = points + table.row(e) * channels;
        if (inner) accumulate<false>(-grad[e], point, point, channels, sum);
        else accumulate<true>(2 * grad[e], query + i * channels, point, channels, sum);
      }
    }
  });
  parallel_for(0, table.points, grain, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      T* sum = grad_points + j * channels;
      std::fill_n(sum, channels, T(0));
      for (int64_t s = start[j]; s < start[j + 1]; ++s) {
        const T* center = query + edge_of[s] / table.k * channels;
        if (inner) accumulate<false>(-grad[edge_of[s]], center, center, channels, sum);
        else accumulate<true>(2 * grad[edge_of[s]], points + j * channels, center, channels, sum);
      }
    }
  });
}
