// The argument checks of SoftTriple's ops and the problems that follow from them.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
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

// The last step: rows' losses, reduced.
struct SoftTripleRows {
  int64_t rows;
  bool weighted, mean, each;
  double regulariser;
};

inline SoftTripleRows soft_triple_rows(const Tensor& others, const Tensor& target, const Tensor& distance,
                                       const std::optional<Tensor>& weights, const Tensor& labels, double regulariser,
                                       const std::string& reduction) {
  STD_TORCH_CHECK(others.dim() == 1, "others: expected shape (B,), got ", to_string(others.sizes()));
  STD_TORCH_CHECK(reduction == "mean" || reduction == "sum" || reduction == "none",
                  "reduction: expected mean, sum or none, got ", reduction);
  check_tensor("target", target, others.sizes(), others);
  check_tensor("distance", distance, {}, others);
  if (weights) check_tensor("weights", *weights, others.sizes(), others);
  check_labels(labels, {0, 1, others.size(0)}, others);
  return {others.size(0), weights.has_value(), reduction == "mean", reduction == "none", regulariser};
}

// The loss of a row, log(1 + e^excess), and its slope, where the log-sum-exp of the other classes exceeds the target.
template <typename A>
struct RowLoss {
  A loss, slope;

  C10_HOST_DEVICE explicit RowLoss(A excess) {
    const A small = std::exp(-std::abs(excess)), one = 1;  // at most 1
    loss = (excess > 0 ? excess : excess == excess ? A(0) : excess) + std::log1p(small);
    slope = (excess > 0 ? one : small) / (one + small);
  }
};

// The sums over all rows: how many count, and of something else.
struct RowTotals {
  double number = 0, sum = 0;

  C10_HOST_DEVICE void add(double count, double value) {
    number += count;
    sum += value;
  }
};

// The rows of one call. Forward writes `loss`, backward reads `grad` and writes gradients.
template <typename A>
struct Rows {
  SoftTripleRows problem;
  const A *others, *target, *distance, *weights;
  const int64_t* labels;
  A* loss = nullptr;
  const A* grad = nullptr;
  A *grad_others = nullptr, *grad_target = nullptr, *grad_distance = nullptr, *grad_weights = nullptr;

  C10_HOST_DEVICE bool counted(int64_t i) const { return labels[i] >= 0; }
  C10_HOST_DEVICE RowLoss<A> row(int64_t i) const { return RowLoss<A>(others[i] - target[i]); }
  C10_HOST_DEVICE A weight(int64_t i) const { return problem.weighted ? weights[i] : A(1); }

  C10_HOST_DEVICE void add_forward(int64_t i, RowTotals* totals) const {
    const A value = counted(i) ? row(i).loss * weight(i) : A(0);
    totals->add(counted(i), value);
    if (problem.each) loss[i] = value + (counted(i) ? extra() : A(0));
  }
  C10_HOST_DEVICE void finish_forward(const RowTotals& totals) const {
    if (problem.each) return;
    const double count = problem.mean ? totals.number : totals.number > 0;
    const double sum = totals.sum + problem.regulariser * *distance * count;
    *loss = static_cast<A>(problem.mean && totals.number > 0 ? sum / totals.number : sum);
  }
  C10_HOST_DEVICE void add_backward(int64_t i, RowTotals* totals) const {
    totals->add(counted(i), problem.each && counted(i) ? grad[i] : A(0));
  }
  C10_HOST_DEVICE void backward(int64_t i, const RowTotals& totals) const {
    const A all = problem.each ? grad[i] : *grad;
    const A own = counted(i) ? all / (problem.mean ? static_cast<A>(totals.number) : A(1)) : A(0);
    const RowLoss<A> of = row(i);
    grad_others[i] = own * weight(i) * of.slope;
    grad_target[i] = -grad_others[i];
    if (problem.weighted) grad_weights[i] = own * of.loss;
  }
  C10_HOST_DEVICE void finish_backward(const RowTotals& totals) const {
    const double all = problem.each ? totals.sum : *grad * static_cast<double>(totals.number > 0);
    *grad_distance = static_cast<A>(problem.regulariser * all);
  }

 private:
  C10_HOST_DEVICE A extra() const { return static_cast<A>(problem.regulariser * *distance); }
};

// Contiguous arguments of the last step.
struct RowTensors {
  SoftTripleRows problem;
  Tensor others, target, distance, labels;
  std::optional<Tensor> weights;

  RowTensors(const Tensor& others, const Tensor& target, const Tensor& distance, const std::optional<Tensor>& weights,
             const Tensor& labels, double regulariser, const std::string& reduction)
      : problem(soft_triple_rows(others, target, distance, weights, labels, regulariser, reduction)),
        others(to_contiguous(others)),
        target(to_contiguous(target)),
        distance(distance),
        labels(to_contiguous(labels)),
        weights(weights) {
    make_contiguous(this->weights);
  }

  template <typename A>
  Rows<A> rows() const {
    return {problem, others.const_data_ptr<A>(), target.const_data_ptr<A>(), distance.const_data_ptr<A>(),
            weights ? weights->const_data_ptr<A>() : nullptr, labels.const_data_ptr<int64_t>()};
  }

  // Calls run(rows) and returns the loss.
  template <typename Run>
  Tensor forward(const Run& run) const {
    Tensor loss = problem.each ? empty_like(others) : new_empty(others, {});
    dispatch_accumulator(others.scalar_type(), [&](auto element) {
      using A = decltype(element);
      Rows<A> call = rows<A>();
      call.loss = loss.mutable_data_ptr<A>();
      run(call);
    });
    return loss;
  }

  // Calls run(rows) and returns the gradients.
  template <typename Run>
  std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, const Run& run) const {
    check_tensor("grad", grad, problem.each ? others.sizes() : IntHeaderOnlyArrayRef(), others);
    make_contiguous(grad);
    Tensor of_others = empty_like(others), of_target = empty_like(others), of_distance = new_empty(others, {});
    Tensor of_weights = problem.weighted ? empty_like(others) : new_empty(others, {0});
    dispatch_accumulator(others.scalar_type(), [&](auto element) {
      using A = decltype(element);
      Rows<A> call = rows<A>();
      call.grad = grad.const_data_ptr<A>();
      call.grad_others = of_others.mutable_data_ptr<A>();
      call.grad_target = of_target.mutable_data_ptr<A>();
      call.grad_distance = of_distance.mutable_data_ptr<A>();
      call.grad_weights = of_weights.mutable_data_ptr<A>();
      run(call);
    });
    return {of_others, of_target, of_distance, of_weights};
  }
};

}  // namespace paper_layers
