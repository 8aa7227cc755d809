// The gradient of the distances: the work of one thread, on a pack of channels of one row.
#pragma once

#include <cstdint>

#include "common/cuda_tensors.cuh"
#include "knn/problem.h"

namespace paper_layers {
namespace {

// sum += weight (x - y), or weight x
template <typename T, int V>
C10_DEVICE void accumulate(Accumulator<T> weight, bool inner, const Pack<T, V>& x, const Pack<T, V>& y,
                           Accumulator<T>* sum) {
  using A = Accumulator<T>;
  for (int v = 0; v < V; ++v) sum[v] += weight * (inner ? A(x[v]) : A(x[v]) - A(y[v]));
}

template <typename T, int V>
C10_DEVICE Pack<T, V> rounded(const Accumulator<T>* sum) {
  Pack<T, V> result;
  for (int v = 0; v < V; ++v) result[v] = static_cast<T>(sum[v]);
  return result;
}

struct RowOfNeighbor {
  NeighborTable table;

  C10_DEVICE int64_t operator()(int64_t edge) const {
    CUDA_KERNEL_ASSERT(table.in_range(edge) && "index: out of range");
    return table.row(edge);
  }
};

// The gradient of a query, from its neighbours.
template <typename T, typename R>
struct QueryGradient {
  using A = Accumulator<T>;
  using Index = typename R::Index;
  static constexpr int V = R::V;

  R shape;
  NeighborTable table;
  bool inner;
  const A* grad;
  const Pack<T, V>* query;
  const Pack<T, V>* points;
  Pack<T, V>* grad_query;

  C10_DEVICE void operator()(Index index) const {
    const Index row = shape.by_packs(index);
    const int64_t pack = index - row * shape.packs, first = row * table.k;
    const Pack<T, V> center = query[index];
    A sum[V] = {};
#pragma unroll 4
    for (int64_t edge = first; edge < first + table.k; ++edge) {
      const int64_t neighbor = table.row(edge);
      CUDA_KERNEL_ASSERT(table.in_range(edge) && "index: out of range");
      if (neighbor < 0) continue;
      const Pack<T, V> point = points[neighbor * shape.packs + pack];
      if (inner) accumulate<T, V>(-grad[edge], true, point, point, sum);
      else accumulate<T, V>(2 * grad[edge], false, center, point, sum);
    }
    grad_query[index] = rounded<T, V>(sum);
  }
};

// The gradient of a point, from the queries that it is a neighbour of.
template <typename T, typename R>
struct PointGradient {
  using A = Accumulator<T>;
  using Index = typename R::Index;
  static constexpr int V = R::V;

  R shape;
  Divider<Index> by_k;
  const int64_t* edges;
  const int64_t* starts;
  bool inner;
  const A* grad;
  const Pack<T, V>* query;
  const Pack<T, V>* points;
  Pack<T, V>* grad_points;

  C10_DEVICE void operator()(Index index) const {
    const Index row = shape.by_packs(index);
    const int64_t pack = index - row * shape.packs, end = starts[row + 1];
    const Pack<T, V> point = points[index];
    A sum[V] = {};
#pragma unroll 4
    for (int64_t s = starts[row]; s < end; ++s) {
      const int64_t edge = edges[s];
      const Pack<T, V> center = query[by_k(static_cast<Index>(edge)) * shape.packs + pack];
      if (inner) accumulate<T, V>(-grad[edge], true, center, center, sum);
      else accumulate<T, V>(2 * grad[edge], false, point, center, sum);
    }
    grad_points[index] = rounded<T, V>(sum);
  }
};

}  // namespace
}  // namespace paper_layers
