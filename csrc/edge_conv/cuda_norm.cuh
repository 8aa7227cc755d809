// The work of one thread in the norm that follows EdgeConv's edge pass: a pack of channels.
#pragma once

#include <cstdint>

#include "common/cuda_neighbors.cuh"
#include "edge_conv/problem.h"

namespace paper_layers {
namespace {

// (x - mean) factor + bias for a node's kept edge; 0 where there is none.
template <typename T, typename R>
struct NormalizeEdges {
  using A = Accumulator<T>;
  static constexpr int V = R::V;

  R shape;
  NeighborRows neighbors;
  EdgeNorm<A> norm;
  const Pack<T, V>* extreme;
  Pack<T, V>* output;

  C10_DEVICE void operator()(typename R::Index index) const {
    const int64_t node = shape.by_packs(index), pack = index - node * shape.packs;
    const bool any = neighbors.any(node);
    const Pack<T, V> kept = extreme[index];
    Pack<T, V> result;
    for (int v = 0; v < V; ++v) {
      const int64_t channel = pack * V + v;
      const A bias = norm.bias != nullptr ? norm.bias[channel] : A(0);
      const A value = (A(kept[v]) - norm.mean[channel]) * norm.factor(channel) + bias;
      result[v] = static_cast<T>(any ? value : A(0));
    }
    output[index] = result;
  }
};

// Sums of the outputs' gradients, and of their products with deviations from the mean, over every so many nodes.
template <typename T, typename R>
struct NormSums {
  using A = Accumulator<T>;
  static constexpr int V = R::V;

  R shape;
  NeighborRows neighbors;
  EdgeNorm<A> norm;
  int64_t nodes, workers;
  const Pack<T, V>* grad;
  const Pack<T, V>* extreme;
  double* sums;  // (workers, 2, channels)

  C10_DEVICE void operator()(typename R::Index index) const {
    const int64_t worker = shape.by_packs(index), packs = shape.packs, pack = index - worker * packs;
    double total[V] = {}, product[V] = {};
    for (int64_t node = worker; node < nodes; node += workers) {
      if (!neighbors.any(node)) continue;
      const Pack<T, V> g = grad[node * packs + pack], kept = extreme[node * packs + pack];
      for (int v = 0; v < V; ++v) {
        total[v] += double(A(g[v]));
        product[v] += double(A(g[v])) * double(A(kept[v]) - norm.mean[pack * V + v]);
      }
    }
    double* const mine = sums + worker * 2 * packs * V + pack * V;
    for (int v = 0; v < V; ++v) {
      mine[v] = total[v];
      mine[packs * V + v] = product[v];
    }
  }
};

// A channel's gradients, from the sums of all workers.
template <typename A>
struct NormGradients {
  EdgeNorm<A> norm;
  int64_t channels;
  const double* sums;  // (2, channels)
  EdgeNormGradients<A> to;

  C10_DEVICE void operator()(int64_t channel) const { to.set(norm, channel, sums[channel], sums[channels + channel]); }
};

}  // namespace
}  // namespace paper_layers
