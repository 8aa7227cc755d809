// The argument checks of SoftTriple's ops and the problems that follow from them.
#pragma once

#include <cstdint>

#include "common/checks.h"

namespace paper_layers {

// A vector that is shorter counts as zero, and what stands under the root of a distance: as in the reference.
constexpr double kShortestSquared = 1e-24, kRoot = 1e-5;

inline void check_tensor(const char* name, const Tensor& tensor, IntHeaderOnlyArrayRef shape, const Tensor& scores) {
  STD_TORCH_CHECK(equal(tensor.sizes(), shape), name, ": expected shape ", to_string(shape), ", got ",
                  to_string(tensor.sizes()));
  check_same_dtype_and_device(name, tensor, "the first argument", scores);
}

// Scores of the centers of some classes, a row of the batch's for each center.
struct SoftTripleChunk {
  int64_t classes, centers, rows;

  int64_t scores_per_class() const { return centers * rows; }
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

// The loss's numbers, as the kernels take them.
template <typename A>
struct SoftTripleFactors {
  A la, per_gamma, la_margin;

  SoftTripleFactors(double la, double gamma, double margin)
      : la(static_cast<A>(la)), per_gamma(static_cast<A>(1 / gamma)), la_margin(static_cast<A>(la * margin)) {}
};

// Centers of classes; `distances` says whether those between the centers of a class are wanted.
struct SoftTripleCenters {
  int64_t classes, centers, channels;
  bool distances;

  int64_t class_size() const { return centers * channels; }
  int64_t pairs() const { return centers * centers; }
};

inline SoftTripleCenters soft_triple_centers_problem(const Tensor& centers, bool distances) {
  STD_TORCH_CHECK(centers.dim() == 3, "centers: expected shape (C, K, d), got ", to_string(centers.sizes()));
  return {centers.size(0), centers.size(1), centers.size(2), distances};
}

inline SoftTripleCenters soft_triple_add_centers_problem(const Tensor& grad, const Tensor& centers,
                                                         const Tensor& inverse, const Tensor& projection,
                                                         const Tensor& pull, const Tensor& grad_distance) {
  const SoftTripleCenters problem = soft_triple_centers_problem(centers, pull.numel() > 0);
  check_tensor("grad", grad, centers.sizes(), centers);
  STD_TORCH_CHECK(grad.is_contiguous(), "grad: expected it contiguous");
  const std::vector<int64_t> lengths = {problem.classes, problem.centers}, scalar = {};
  const std::vector<int64_t> pulls = {problem.classes, problem.centers, problem.centers};
  check_tensor("inverse", inverse, lengths, centers);
  check_tensor("projection", projection, lengths, centers);
  check_tensor("grad_distance", grad_distance, scalar, centers);
  if (problem.distances) check_tensor("pull", pull, pulls, centers);
  return problem;
}

}  // namespace paper_layers
