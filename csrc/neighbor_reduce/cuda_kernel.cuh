// The work of one thread in reductions over neighbours' rows: a pack of channels of one row.
#pragma once

#include <cstdint>

#include "common/cuda_neighbors.cuh"

namespace paper_layers {
namespace {

// The largest or smallest, and the column of the first of these; NaN is beyond all others.
template <typename T, typename R>
struct Extreme {
  using A = Accumulator<T>;
  using Index = typename R::Index;
  static constexpr int V = R::V;

  R shape;
  NeighborRows neighbors;
  bool largest, relative;
  const Pack<T, V>* input;
  Pack<T, V>* output;
  Pack<int32_t, V>* arg;

  C10_DEVICE void operator()(Index index) const {
    const Index node = shape.by_packs(index);
    A best[V] = {};
    Pack<int32_t, V> column;
    for (int v = 0; v < V; ++v) column[v] = -1;
    neighbors.each(node, input, shape.packs, index - node * shape.packs, [&](int32_t at, const Pack<T, V>& row) {
      for (int v = 0; v < V; ++v) {
        const A x = row[v];
        const bool beyond = largest ? x > best[v] : x < best[v];
        if (column[v] < 0 || beyond || (x != x && best[v] == best[v])) {
          best[v] = x;
          column[v] = at;
        }
      }
    });
    // Where one channel has a neighbour, all have.
    const Pack<T, V> own = relative && column[0] >= 0 ? input[index] : Pack<T, V>{};
    Pack<T, V> result;
    for (int v = 0; v < V; ++v) result[v] = static_cast<T>(best[v] - A(own[v]));
    output[index] = result;
    arg[index] = column;
  }
};

// The sum or the mean.
template <typename T, typename R>
struct Total {
  using A = Accumulator<T>;
  using Index = typename R::Index;
  static constexpr int V = R::V;

  R shape;
  NeighborRows neighbors;
  bool mean, relative;
  const Pack<T, V>* input;
  Pack<T, V>* output;

  C10_DEVICE void operator()(Index index) const {
    const Index node = shape.by_packs(index);
    A sum[V] = {};
    int32_t count = 0;
    neighbors.each(node, input, shape.packs, index - node * shape.packs, [&](int32_t, const Pack<T, V>& row) {
      for (int v = 0; v < V; ++v) sum[v] += A(row[v]);
      ++count;
    });
    const A divisor = mean && count > 0 ? A(count) : A(1);
    const Pack<T, V> own = relative && count > 0 ? input[index] : Pack<T, V>{};
    Pack<T, V> result;
    for (int v = 0; v < V; ++v) result[v] = static_cast<T>((sum[v] - A(count) * A(own[v])) / divisor);
    output[index] = result;
  }
};

// The number of neighbours of each node.
template <typename A>
struct CountNeighbors {
  const int64_t* index;
  int64_t k;
  A* counts;

  C10_DEVICE void operator()(int64_t node) const {
    int32_t count = 0;
    for (int64_t column = 0; column < k; ++column) count += index[node * k + column] >= 0;
    counts[node] = static_cast<A>(count);
  }
};

// The gradient of a row, from the nodes that it is a neighbour of.
template <typename T, typename R>
struct Gather {
  using A = Accumulator<T>;
  using Index = typename R::Index;
  static constexpr int V = R::V;

  R shape;
  Divider<Index> by_k;
  int64_t k;
  bool mean, relative;
  const int64_t* edges;
  const int64_t* starts;
  const Pack<T, V>* grad;
  const Pack<int32_t, V>* arg;  // of the largest or smallest, or null
  const A* counts;              // of neighbours, where they matter, or null
  Pack<T, V>* grad_input;

  C10_DEVICE void operator()(Index index) const {
    const Index row = shape.by_packs(index);
    const int64_t pack = index - row * shape.packs, end = starts[row + 1];
    A sum[V] = {};
#pragma unroll kBatch
    for (int64_t s = starts[row]; s < end; ++s) {
      const int64_t edge = edges[s], node = by_k(static_cast<Index>(edge)), column = edge - node * k;
      const Pack<T, V> g = grad[node * shape.packs + pack];
      if (arg != nullptr) {
        const Pack<int32_t, V> chosen = arg[node * shape.packs + pack];
        for (int v = 0; v < V; ++v) sum[v] += chosen[v] == column ? A(g[v]) : A(0);
      } else {
        const A divisor = mean ? counts[node] : A(1);
        for (int v = 0; v < V; ++v) sum[v] += A(g[v]) / divisor;
      }
    }
    if (relative) {
      const Pack<T, V> g = grad[index];
      const Pack<int32_t, V> chosen = arg != nullptr ? arg[index] : Pack<int32_t, V>{};
      const A times = arg != nullptr ? A(1) : mean ? A(counts[row] > 0) : counts[row];
      for (int v = 0; v < V; ++v) sum[v] -= chosen[v] >= 0 ? times * A(g[v]) : A(0);
    }
    Pack<T, V> result;
    for (int v = 0; v < V; ++v) result[v] = static_cast<T>(sum[v]);
    grad_input[index] = result;
  }
};

}  // namespace
}  // namespace paper_layers
