// The work of one thread, or of one warp, in SoftTriple between the matrix products. The batch is what threads that
// are next to one another differ in, as it is in memory.
#pragma once

#include <cstdint>
#include <limits>

#include "common/cuda_utils.cuh"
#include "soft_triple/problem.h"

namespace paper_layers {
namespace {

template <typename A>
C10_DEVICE A sum_of_warp(A value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// As in torch's own indexing, a label out of range stops the device's work with an assertion: the host could not know
// of it without waiting.
struct KnownLabel {
  const int64_t* labels;
  int64_t classes, ignore_index;
  int64_t* to;

  C10_DEVICE void operator()(int64_t i) const {
    const int64_t label = labels[i];
    const bool ignored = label == ignore_index;
    CUDA_KERNEL_ASSERT((ignored || (label >= 0 && label < classes)) && "labels: out of range");
    to[i] = ignored ? -1 : label;
  }
};

// The product of two centers of a class, by a warp; only the diagonal where no distances are wanted.
template <typename A>
struct CenterProducts {
  SoftTripleCenters problem;
  const A* centers;
  A* products;  // (C, K, K), or (C, K)

  C10_DEVICE void operator()(int64_t thread) const {
    const int64_t K = problem.centers, pair = thread / kWarp, others = problem.distances ? K : 1;
    const int64_t row = pair / others, j = row % K, k = problem.distances ? pair % K : j;
    if (k > j) return;
    const A *a = centers + row * problem.channels, *b = a + (k - j) * problem.channels;
    A sum = 0;
    for (int64_t c = thread % kWarp; c < problem.channels; c += kWarp) sum += a[c] * b[c];
    sum = sum_of_warp(sum);
    if (thread % kWarp == 0) products[pair] = sum;
  }
};

// Lengths, distances and pull of a class, from the products of its centers.
template <typename A>
struct CentersOfClass {
  SoftTripleCenters problem;
  A* products;
  A* inverse;
  double* sums;

  C10_DEVICE void operator()(int64_t c) const {
    const int64_t K = problem.centers, step = problem.distances ? K + 1 : 1;
    A *const own = products + c * (problem.distances ? problem.pairs() : K), *const lengths = inverse + c * K;
    for (int64_t k = 0; k < K; ++k) lengths[k] = inverse_length(own[k * step]);
    sums[c] = problem.distances ? distances_of_class(K, lengths, own) : 0;
  }
};

// One channel of the gradients of a class's centers.
template <typename A>
struct AddCenters {
  SoftTripleCenters problem;
  const A *centers, *inverse, *projection, *pull, *grad_distance;
  A* grad;

  C10_DEVICE void operator()(int64_t index) const {
    const int64_t K = problem.centers, c = index / problem.channels;
    const int64_t at = c * problem.class_size() + index % problem.channels;
    const A factor = problem.distances ? *grad_distance : A(0);
    for (int64_t j = 0; j < K; ++j) {
      const A length = inverse[c * K + j];
      A sum = -projection[c * K + j] * length * length * centers[at + j * problem.channels];
      for (int64_t k = 0; problem.distances && k < K; ++k) {
        sum += factor * pull[(c * K + j) * K + k] * centers[at + k * problem.channels];
      }
      grad[at + j * problem.channels] += sum;
    }
  }
};

// The centers of a class as one row of the batch sees them.
template <typename A>
struct Relaxed {
  const A *scores, *inverse;
  int64_t centers, rows;
  A per_gamma;
  A largest, sum, similarity;

  C10_DEVICE Relaxed(const SoftTripleChunk& chunk, A per_gamma, const A* all_scores, const A* all_inverse, int64_t c,
                     int64_t row)
      : scores(all_scores + c * chunk.scores_per_class() + row),
        inverse(all_inverse + c * chunk.centers),
        centers(chunk.centers),
        rows(chunk.rows),
        per_gamma(per_gamma),
        largest(cosine(0)),
        sum(0) {
    for (int64_t k = 1; k < centers; ++k) largest = cosine(k) > largest ? cosine(k) : largest;
    A total = 0;
    for (int64_t k = 0; k < centers; ++k) {
      const A s = cosine(k), weight = std::exp((s - largest) * per_gamma);
      sum += weight;
      total += weight * s;
    }
    similarity = total / sum;
  }

  C10_DEVICE A cosine(int64_t k) const { return scores[k * rows] * inverse[k]; }
  // The gradient of a center's cosine, given the similarity's.
  C10_DEVICE A gradient(A s, A grad) const {
    return grad * std::exp((s - largest) * per_gamma) / sum * (1 + (s - similarity) * per_gamma);
  }
};

// Classes of which a thread sums up the logits.
constexpr int64_t kClassesPerThread = 8;

// Less than a logit; finite, so that the difference of two of them is a number.
template <typename A>
constexpr A kLowest = std::numeric_limits<A>::lowest();

// The log-sum-exp of some classes but the row's own, for one row of the batch, as the largest and the sum relative to
// it: what a sum of all would round off is the whole loss of a row that is far from the others.
template <typename A>
struct PartialLogSumExp {
  SoftTripleChunk chunk;
  SoftTripleFactors<A> factors;
  const A *scores, *inverse;
  const int64_t* labels;
  int64_t first;
  A *partials, *target;  // (parts, 2, B), (B,)

  C10_DEVICE void operator()(int64_t index) const {
    const int64_t part = index / chunk.rows, row = index % chunk.rows;
    const int64_t begin = part * kClassesPerThread, own = class_in_chunk(labels[row], first, chunk.classes);
    const int64_t end = begin + kClassesPerThread < chunk.classes ? begin + kClassesPerThread : chunk.classes;
    A largest = kLowest<A>, sum = 0;
    for (int64_t c = begin; c < end; ++c) {
      const A logit = factors.la * Relaxed<A>(chunk, factors.per_gamma, scores, inverse, c, row).similarity;
      if (c == own) {
        target[row] = logit - factors.la_margin;
        continue;
      }
      if (logit > largest) {
        sum *= std::exp(largest - logit);
        largest = logit;
      }
      sum += std::exp(logit - largest);
    }
    partials[2 * part * chunk.rows + row] = largest;
    partials[(2 * part + 1) * chunk.rows + row] = sum;
  }
};

template <typename A>
struct CombineLogSumExps {
  int64_t parts, rows;
  const A* partials;
  A* to;

  C10_DEVICE void operator()(int64_t row) const {
    A largest = kLowest<A>, sum = 0;
    for (int64_t p = 0; p < parts; ++p) {
      const A value = partials[2 * p * rows + row];
      largest = value > largest ? value : largest;
    }
    for (int64_t p = 0; p < parts; ++p) {
      sum += std::exp(partials[2 * p * rows + row] - largest) * partials[(2 * p + 1) * rows + row];
    }
    to[row] = largest + std::log(sum);
  }
};

template <typename A>
struct Similarity {
  SoftTripleChunk chunk;
  A per_gamma;
  const A *scores, *inverse;
  A* to;

  C10_DEVICE void operator()(int64_t index) const {
    to[index] = Relaxed<A>(chunk, per_gamma, scores, inverse, index / chunk.rows, index % chunk.rows).similarity;
  }
};

// The gradient of a class's similarity to a row of the batch: of the loss ...
template <typename A>
struct LossGradient {
  int64_t rows, classes;
  SoftTripleFactors<A> factors;
  const int64_t* labels;
  int64_t first;
  const A *logsumexp, *grad_logsumexp, *grad_target;

  C10_DEVICE A operator()(int64_t c, int64_t row, A similarity) const {
    if (class_in_chunk(labels[row], first, classes) == c) return factors.la * grad_target[row];
    return factors.la * grad_logsumexp[row] * std::exp(factors.la * similarity - logsumexp[row]);
  }
};

// ... or as given.
template <typename A>
struct GivenGradient {
  int64_t rows;
  const A* grad;

  C10_DEVICE A operator()(int64_t c, int64_t row, A) const { return grad[c * rows + row]; }
};

// Scores become their gradients: a warp takes a class and as many rows of the batch as it has lanes.
template <typename A, typename Gradient>
struct ReplaceByGradients {
  SoftTripleChunk chunk;
  A per_gamma;
  Gradient gradient;
  A* scores;
  const A* inverse;
  A* projections;  // (tiles of rows, C, K)

  C10_DEVICE void operator()(int64_t thread) const {
    const int64_t warp = thread / kWarp, c = warp % chunk.classes, tile = warp / chunk.classes;
    const int64_t row = tile * kWarp + thread % kWarp;
    const bool inside = row < chunk.rows;
    // Lanes outside go along with the last row, for the sums of the warp.
    const int64_t at = inside ? row : chunk.rows - 1;
    const Relaxed<A> relaxed(chunk, per_gamma, scores, inverse, c, at);
    const A grad = gradient(c, at, relaxed.similarity);
    A* const rows = scores + c * chunk.scores_per_class() + at;
    for (int64_t k = 0; k < chunk.centers; ++k) {
      const A s = relaxed.cosine(k), g = inside ? relaxed.gradient(s, grad) : A(0);
      const A sum = sum_of_warp(inside ? g * s : A(0));
      __syncwarp();
      if (inside) rows[k * chunk.rows] = g * inverse[c * chunk.centers + k];
      if (thread % kWarp == 0) projections[(tile * chunk.classes + c) * chunk.centers + k] = sum;
    }
  }
};

// The last step for all rows, by one block: the batch is short. Rows are added in an order that does not vary.
template <typename A, bool backward>
__global__ void __launch_bounds__(kThreads) reduce_rows_kernel(const __grid_constant__ Rows<A> rows) {
  __shared__ double numbers[kThreads], sums[kThreads];
  RowTotals totals;
  for (int64_t i = threadIdx.x; i < rows.problem.rows; i += kThreads) {
    if (backward) rows.add_backward(i, &totals);
    else rows.add_forward(i, &totals);
  }
  numbers[threadIdx.x] = totals.number;
  sums[threadIdx.x] = totals.sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      numbers[threadIdx.x] += numbers[threadIdx.x + half];
      sums[threadIdx.x] += sums[threadIdx.x + half];
    }
  }
  __syncthreads();
  totals = {numbers[0], sums[0]};
  if (backward) {
    for (int64_t i = threadIdx.x; i < rows.problem.rows; i += kThreads) rows.backward(i, totals);
    if (threadIdx.x == 0) rows.finish_backward(totals);
  } else if (threadIdx.x == 0) {
    rows.finish_forward(totals);
  }
}

}  // namespace
}  // namespace paper_layers
