// The argument checks of SoftTriple's ops and the problems that follow from them.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include <torch/headeronly/macros/Macros.h>

#include "common/tensors.h"

namespace paper_layers {

// Vectors of a lower squared length count as zero; kRoot is added under the root of a distance: as in the reference.
constexpr double kShortestSquared = 1e-24, kRoot = 1e-5;

inline void check_tensor(const char* name, const Tensor& tensor, IntHeaderOnlyArrayRef shape, const Tensor& scores) {
  check_shape(name, tensor, shape);
  check_same_dtype_and_device(name, tensor, "the first argument", scores);
}

// Scores of the centers of some classes, a row of the batch's for each center.
struct SoftTripleChunk {
  int64_t classes, centers, rows;

  C10_HOST_DEVICE int64_t scores_per_class() const { return centers * rows; }
};

inline SoftTripleChunk soft_triple_chunk(const Tensor& scores, const Tensor& inverse) {
  STD_TORCH_CHECK(inverse.dim() == 2 && inverse.size(1) > 0, "inverse: expected shape (C, K) with K at least 1, got ",
                  to_string(inverse.sizes()));
  STD_TORCH_CHECK(scores.dim() == 2 && scores.size(0) == inverse.numel() && scores.is_contiguous(),
                  "scores: expected contiguous (", inverse.numel(), ", B), got ", to_string(scores.sizes()));
  check_same_dtype_and_device("inverse", inverse, "scores", scores);
  return {inverse.size(0), inverse.size(1), scores.size(1)};
}

inline void check_labels(const Tensor& labels, const SoftTripleChunk& chunk, const Tensor& scores) {
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == chunk.rows && labels.scalar_type() == ScalarType::Long,
                  "labels: expected int64 of shape (", chunk.rows, "), got ", labels.scalar_type(), " of shape ",
                  to_string(labels.sizes()));
  check_same_device("labels", labels, "scores", scores);
}

inline void check_chunk_backward(const Tensor& labels, const Tensor& logsumexp, const Tensor& grad_logsumexp,
                                 const Tensor& grad_target, const SoftTripleChunk& chunk, const Tensor& scores) {
  check_labels(labels, chunk, scores);
  check_tensor("logsumexp", logsumexp, {chunk.rows}, scores);
  check_tensor("grad_logsumexp", grad_logsumexp, {chunk.rows}, scores);
  check_tensor("grad_target", grad_target, {chunk.rows}, scores);
}

// A label's class within a chunk that starts at class `first`, -1 where it is none of its. Unsigned numbers do not
// overflow, whatever the label.
C10_HOST_DEVICE inline int64_t class_in_chunk(int64_t label, int64_t first, int64_t classes) {
  const uint64_t at = static_cast<uint64_t>(label) - static_cast<uint64_t>(first);
  return label >= first && at < static_cast<uint64_t>(classes) ? static_cast<int64_t>(at) : -1;
}

// The loss's numbers, as the kernels take them.
template <typename A>
struct SoftTripleFactors {
  A la, per_gamma, la_margin;

  SoftTripleFactors(double la, double gamma, double margin)
      : la(static_cast<A>(la)), per_gamma(static_cast<A>(1 / gamma)), la_margin(static_cast<A>(la * margin)) {}
};

// Centers of classes; `distances`: the distances between the centers of a class are wanted.
struct SoftTripleCenters {
  int64_t classes, centers, channels;
  bool distances;

  C10_HOST_DEVICE int64_t class_size() const { return centers * channels; }
  C10_HOST_DEVICE int64_t pairs() const { return centers * centers; }
};

// One over the length of a center, and 0 of one that counts as zero.
template <typename A>
C10_HOST_DEVICE A inverse_length(A square) {
  return square <= A(kShortestSquared) ? A(0) : 1 / std::sqrt(square);
}

// One class: products of its centers (K, K), below the diagonal and in it, become its pull, which times the centers is
// the gradient of the sum of their distances, the result.
template <typename A>
C10_HOST_DEVICE double distances_of_class(int64_t K, const A* inverse, A* products) {
  for (int64_t j = 0; j < K; ++j) products[j * K + j] = 0;
  double sum = 0;
  for (int64_t j = 0; j < K; ++j) {
    for (int64_t k = 0; k < j; ++k) {
      const A cosine = products[j * K + k] * inverse[j] * inverse[k];
      const A squared = 2 - 2 * cosine;
      const A distance = std::sqrt((squared < 0 ? A(0) : squared) + A(kRoot));
      const A slope = -1 / distance;
      sum += distance;
      products[j * K + j] -= slope * cosine;
      products[k * K + k] -= slope * cosine;
      products[j * K + k] = products[k * K + j] = slope * inverse[j] * inverse[k];
    }
  }
  for (int64_t j = 0; j < K; ++j) products[j * K + j] *= inverse[j] * inverse[j];
  return sum;
}

inline SoftTripleCenters soft_triple_centers_problem(const Tensor& centers, bool distances) {
  STD_TORCH_CHECK(centers.dim() == 3 && centers.size(1) > 0, "centers: expected shape (C, K, d) with K at least 1, got ",
                  to_string(centers.sizes()));
  return {centers.size(0), centers.size(1), centers.size(2), distances};
}

inline SoftTripleCenters soft_triple_add_centers_problem(const Tensor& grad, const Tensor& centers,
                                                         const Tensor& inverse, const Tensor& projection,
                                                         const Tensor& pull, const Tensor& grad_distance) {
  const SoftTripleCenters problem = soft_triple_centers_problem(centers, pull.numel() > 0);
  check_tensor("grad", grad, centers.sizes(), centers);
  STD_TORCH_CHECK(grad.is_contiguous(), "grad: expected it contiguous");
  check_tensor("inverse", inverse, {problem.classes, problem.centers}, centers);
  check_tensor("projection", projection, {problem.classes, problem.centers}, centers);
  check_tensor("grad_distance", grad_distance, {}, centers);
  if (problem.distances) check_tensor("pull", pull, {problem.classes, problem.centers, problem.centers}, centers);
  return problem;
}

// The whole loss: embeddings (rows, channels), centers (classes, centers, channels), and the accumulation dtype.
struct SoftTripleLoss {
  int64_t rows, channels, classes, centers, chunk_size;
  ScalarType dtype;
};

inline SoftTripleLoss soft_triple_problem(const Tensor& embeddings, const Tensor& centers, int64_t chunk_size) {
  STD_TORCH_CHECK(embeddings.dim() == 2, "embeddings: expected shape (B, d), got ", to_string(embeddings.sizes()));
  STD_TORCH_CHECK(centers.dim() == 3 && centers.size(1) > 0 && centers.size(2) == embeddings.size(1),
                  "centers: expected shape (C, K, ", embeddings.size(1), ") with K at least 1, got ",
                  to_string(centers.sizes()));
  check_floating("embeddings", embeddings);
  check_floating("centers", centers);
  check_same_device("centers", centers, "embeddings", embeddings);
  const bool wide = embeddings.scalar_type() == ScalarType::Double || centers.scalar_type() == ScalarType::Double;
  return {embeddings.size(0), embeddings.size(1), centers.size(0), centers.size(1), chunk_size,
          wide ? ScalarType::Double : ScalarType::Float};
}

inline SoftTripleLoss soft_triple_loss_problem(const Tensor& embeddings, const Tensor& centers, const Tensor& labels,
                                               int64_t chunk_size) {
  const SoftTripleLoss loss = soft_triple_problem(embeddings, centers, chunk_size);
  check_labels(labels, {loss.classes, loss.centers, loss.rows}, embeddings);
  return loss;
}

inline void check_logits_backward(const SoftTripleLoss& loss, const Tensor& grad, const Tensor& inverse) {
  STD_TORCH_CHECK(grad.scalar_type() == loss.dtype, "grad: expected ", loss.dtype, ", got ", grad.scalar_type());
  check_tensor("grad", grad, {loss.rows, loss.classes}, grad);
  check_tensor("inverse", inverse, {loss.classes, loss.centers}, grad);
}

inline void check_loss_backward(const SoftTripleLoss& loss, const Tensor& grad_logsumexp, const Tensor& grad_target,
                                const Tensor& grad_distance, const Tensor& logsumexp, const Tensor& inverse,
                                const Tensor& pull) {
  STD_TORCH_CHECK(logsumexp.scalar_type() == loss.dtype, "logsumexp: expected ", loss.dtype, ", got ",
                  logsumexp.scalar_type());
  check_tensor("logsumexp", logsumexp, {loss.rows}, logsumexp);
  check_tensor("grad_logsumexp", grad_logsumexp, {loss.rows}, logsumexp);
  check_tensor("grad_target", grad_target, {loss.rows}, logsumexp);
  check_tensor("grad_distance", grad_distance, {}, logsumexp);
  check_tensor("inverse", inverse, {loss.classes, loss.centers}, logsumexp);
  if (pull.numel() > 0) check_tensor("pull", pull, {loss.classes, loss.centers, loss.centers}, logsumexp);
}

}  // namespace paper_layers
