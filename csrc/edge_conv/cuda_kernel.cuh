// The work of one thread in the edge pass of EdgeConv: a pack of channels, of some nodes or of one row.
#pragma once

#include <cstdint>

#include "common/cuda_neighbors.cuh"
#include "edge_conv/problem.h"

namespace paper_layers {
namespace {

// max(z, 0) + slope min(z, 0), NaN for NaN; no product of zero and infinity.
template <typename A>
C10_DEVICE A leaky_relu(A z, A slope) {
  if (z > A(0)) return z;
  return slope == A(0) && z <= A(0) ? A(0) : slope * z;
}

// Edges that are looked at for one that is there.
constexpr int64_t kSample = 256;

// The inputs of forward and backward kernels. The slope stays on the device: reading it on the host would wait.
template <typename T, typename R>
struct Graph {
  using A = Accumulator<T>;
  using Index = typename R::Index;
  static constexpr int V = R::V;

  R shape;
  NeighborRows neighbors;
  int64_t nodes;
  const Pack<T, V>* center;
  const Pack<T, V>* neighbor;
  const A* slope_at;  // or null
  A slope_number;

  C10_DEVICE A slope() const { return slope_at != nullptr ? *slope_at : slope_number; }

  // Calls body(column, z, y) for the edges of a node.
  template <typename Body>
  C10_DEVICE void each(int64_t node, int64_t pack, Body body) const {
    const Pack<T, V> own = center[node * shape.packs + pack];
    const A factor = slope();
    neighbors.each(node, neighbor, shape.packs, pack, [&](int32_t column, const Pack<T, V>& row) {
      A z[V], y[V];
      for (int v = 0; v < V; ++v) {
        z[v] = A(own[v]) + A(row[v]);
        y[v] = leaky_relu(z[v], factor);
      }
      body(column, z, y);
    });
  }

  // The center of deviations, so that an offset of all edges does not swallow their variance: the value of the first
  // edge that exists among some. The value of a missing edge may be far from all others.
  C10_DEVICE void find_shift(int64_t pack, double (&shift)[V]) const {
    for (int v = 0; v < V; ++v) shift[v] = 0;
    const int64_t edges = nodes * neighbors.k, step = edges / kSample + 1;
    for (int64_t edge = 0; edge < edges; edge += step) {
      const int64_t row = neighbors.index[edge];
      if (row < 0 || row >= neighbors.rows) continue;
      const int64_t node = edge / neighbors.k;
      const Pack<T, V> own = center[node * shape.packs + pack];
      const Pack<T, V> other = neighbor[(neighbors.start(node) + row) * shape.packs + pack];
      for (int v = 0; v < V; ++v) {
        const double y = leaky_relu(A(own[v]) + A(other[v]), slope());
        if (y - y == 0) shift[v] = y;  // finite
      }
      return;
    }
  }
};

// Every so many nodes, from one on: as many partial sums, whatever the device, are added up in the same order.
template <typename T, typename R, bool statistics>
struct EdgeForward {
  using A = Accumulator<T>;
  static constexpr int V = R::V;

  Graph<T, R> graph;
  int64_t workers;
  Kept<A> kept;
  Pack<T, V>* output;
  double* sums;    // of deviations and of their squares, (workers, 2, channels)
  double* counts;  // of edges

  C10_DEVICE void operator()(typename R::Index index) const {
    const int64_t worker = graph.shape.by_packs(index), packs = graph.shape.packs, pack = index - worker * packs;
    bool least[V];
    double shift[V], sum[V] = {}, square[V] = {};
    for (int v = 0; v < V; ++v) least[v] = kept.least(pack * V + v);
    if (statistics) graph.find_shift(pack, shift);
    int64_t count = 0;
    for (int64_t node = worker; node < graph.nodes; node += workers) {
      A best[V] = {};
      bool found = false;
      graph.each(node, pack, [&](int32_t, const A(&)[V], const A(&y)[V]) {
        for (int v = 0; v < V; ++v) {
          const bool beyond = least[v] ? y[v] < best[v] : y[v] > best[v];
          if (!found || beyond || (y[v] != y[v] && best[v] == best[v])) best[v] = y[v];
          if (statistics) {
            const double deviation = double(y[v]) - shift[v];
            sum[v] += deviation;
            square[v] += deviation * deviation;
          }
        }
        found = true;
        ++count;
      });
      Pack<T, V> result;
      for (int v = 0; v < V; ++v) result[v] = static_cast<T>(best[v]);
      output[node * packs + pack] = result;
    }
    if (!statistics) return;
    double* const mine = sums + worker * 2 * packs * V + pack * V;
    for (int v = 0; v < V; ++v) {
      mine[v] = sum[v];
      mine[packs * V + v] = square[v];
    }
    if (pack == 0) counts[worker] = static_cast<double>(count);
  }
};

// The mean and variance of a pack of channels, from the sums of all workers.
template <typename T, typename R>
struct Statistics {
  using A = Accumulator<T>;
  static constexpr int V = R::V;

  Graph<T, R> graph;
  const double* sums;  // (2, channels)
  const double* count;
  A* mean;
  A* var;

  C10_DEVICE void operator()(typename R::Index pack) const {
    double shift[V];
    graph.find_shift(pack, shift);
    const double edges = *count > 1 ? *count : 1;
    for (int v = 0; v < V; ++v) {
      const int64_t channel = int64_t(pack) * V + v;
      const double deviation = sums[channel] / edges;
      const double variance = sums[graph.shape.packs * V + channel] / edges - deviation * deviation;
      mean[channel] = static_cast<A>(*count > 0 ? shift[v] + deviation : 0);
      var[channel] = static_cast<A>(variance < 0 ? 0 : variance);
    }
  }
};

// An edge's part in the gradient of the statistics, of mean and variance over all edges, and the factor of the kept
// edge's gradient.
template <typename A, int V>
struct ChannelGradients {
  A factor[V], mean[V], constant[V], linear[V];

  C10_DEVICE ChannelGradients(const EdgeGradients<A>& of, const double* count, int64_t pack) {
    for (int v = 0; v < V; ++v) {
      const double edges = of.mean != nullptr && *count > 1 ? *count : 1;
      const int64_t channel = pack * V + v;
      factor[v] = of.factor != nullptr ? of.factor[channel] : A(1);
      mean[v] = of.mean != nullptr ? of.mean[channel] : A(0);
      linear[v] = of.mean != nullptr ? static_cast<A>(2 * of.grad_var[channel] / edges) : A(0);
      // An infinite mean leaves no edge a gradient.
      constant[v] = of.mean != nullptr
                        ? static_cast<A>(of.grad_mean[channel] / edges) + linear[v] * (mean[v] - mean[v])
                        : A(0);
    }
  }
};

// The gradient of the centre terms and of the slope, and which edge each node kept, -1 for none.
template <typename T, typename R>
struct EdgeBackwardCenter {
  using A = Accumulator<T>;
  static constexpr int V = R::V;

  Graph<T, R> graph;
  EdgeGradients<A> gradients;
  const double* count;  // of edges
  int64_t workers;
  const Pack<T, V>* grad;
  const Pack<T, V>* output;
  Pack<T, V>* grad_center;
  Pack<int32_t, V>* arg;
  double* slopes;  // (workers, packs)

  C10_DEVICE void operator()(typename R::Index index) const {
    const int64_t worker = graph.shape.by_packs(index), packs = graph.shape.packs, pack = index - worker * packs;
    const ChannelGradients<A, V> all(gradients, count, pack);
    const bool statistics = gradients.mean != nullptr;
    const A slope = graph.slope();
    double slanted = 0;
    for (int64_t node = worker; node < graph.nodes; node += workers) {
      const Pack<T, V> g = grad[node * packs + pack], kept = output[node * packs + pack];
      A sum[V] = {};
      Pack<int32_t, V> chosen;
      for (int v = 0; v < V; ++v) chosen[v] = -1;
      graph.each(node, pack, [&](int32_t column, const A(&z)[V], const A(&y)[V]) {
        for (int v = 0; v < V; ++v) {
          const A rounded = A(static_cast<T>(y[v])), best = A(kept[v]);
          A part = 0;
          if (chosen[v] < 0 && (rounded == best || (rounded != rounded && best != best))) {
            chosen[v] = column;
            part = A(g[v]) * all.factor[v];
          }
          if (statistics) part += all.constant[v] + all.linear[v] * (y[v] - all.mean[v]);
          if (!(z[v] > A(0))) {
            slanted += double(part) * double(z[v]);
            part *= slope;
          }
          sum[v] += part;
        }
      });
      Pack<T, V> result;
      for (int v = 0; v < V; ++v) result[v] = static_cast<T>(sum[v]);
      grad_center[node * packs + pack] = result;
      arg[node * packs + pack] = chosen;
    }
    slopes[index] = slanted;
  }
};

// The gradient of a row of neighbour terms, from the edges that lead to it.
template <typename T, typename R>
struct EdgeBackwardNeighbor {
  using A = Accumulator<T>;
  using Index = typename R::Index;
  static constexpr int V = R::V;

  Graph<T, R> graph;
  EdgeGradients<A> gradients;
  const double* count;  // of edges
  Divider<Index> by_k;
  const int64_t* edges;
  const int64_t* starts;
  const Pack<T, V>* grad;
  const Pack<int32_t, V>* arg;
  Pack<T, V>* grad_neighbor;

  C10_DEVICE void operator()(Index index) const {
    const int64_t row = graph.shape.by_packs(index), packs = graph.shape.packs, pack = index - row * packs;
    const ChannelGradients<A, V> all(gradients, count, pack);
    const bool statistics = gradients.mean != nullptr;
    const A slope = graph.slope();
    const Pack<T, V> own = graph.neighbor[index];
    const int64_t end = starts[row + 1];
    A sum[V] = {};
#pragma unroll 4
    for (int64_t s = starts[row]; s < end; ++s) {
      const int64_t edge = edges[s], node = by_k(static_cast<Index>(edge)), column = edge - node * graph.neighbors.k;
      const Pack<T, V> other = graph.center[node * packs + pack], g = grad[node * packs + pack];
      const Pack<int32_t, V> chosen = arg[node * packs + pack];
      for (int v = 0; v < V; ++v) {
        const A z = A(other[v]) + A(own[v]);
        A part = chosen[v] == column ? A(g[v]) * all.factor[v] : A(0);
        if (statistics) part += all.constant[v] + all.linear[v] * (leaky_relu(z, slope) - all.mean[v]);
        sum[v] += z > A(0) ? part : slope * part;
      }
    }
    Pack<T, V> result;
    for (int v = 0; v < V; ++v) result[v] = static_cast<T>(sum[v]);
    grad_neighbor[index] = result;
  }
};

// The number of edges in each worker's part of the table.
struct CountEdges {
  const int64_t* index;
  int64_t edges, workers;
  double* counts;

  C10_DEVICE void operator()(int64_t worker) const {
    int64_t count = 0;
    for (int64_t edge = worker; edge < edges; edge += workers) count += index[edge] >= 0;
    counts[worker] = static_cast<double>(count);
  }
};

}  // namespace
}  // namespace paper_layers
