// SoftTriple between the matrix products on the CPU.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>

#include "common/matrix_view.h"
#include "soft_triple/problem.h"

#define PAPER_LAYERS_KERNEL "soft_triple/cpu_kernel.isa.h"
#include "common/for_each_isa.h"
#include "soft_triple/cpu_loss.h"

namespace paper_layers {
namespace {

std::tuple<Tensor, Tensor, Tensor> soft_triple_centers(Tensor centers, bool distances) {
  const SoftTripleCenters problem = soft_triple_centers_problem(centers, distances);
  make_contiguous(centers);
  const int64_t classes = problem.classes, count = problem.centers;
  Tensor inverse = new_empty(centers, {classes, count}), distance = new_empty(centers, {});
  Tensor pull = distances ? new_empty(centers, {classes, count, count}) : new_empty(centers, {0});
  dispatch_accumulator(centers.scalar_type(), [&](auto element) {
    using A = decltype(element);
    PAPER_LAYERS_DISPATCH(soft_triple_centers(problem, centers.const_data_ptr<A>(), inverse.mutable_data_ptr<A>(),
                                              distance.mutable_data_ptr<A>(), pull.mutable_data_ptr<A>()));
  });
  return {inverse, distance, pull};
}

void soft_triple_add_centers(Tensor grad, Tensor centers, Tensor inverse, Tensor projection, Tensor pull,
                             const Tensor& grad_distance) {
  const SoftTripleCenters problem =
      soft_triple_add_centers_problem(grad, centers, inverse, projection, pull, grad_distance);
  if (grad.numel() == 0) return;
  make_contiguous(centers, inverse, projection, pull);
  dispatch_accumulator(centers.scalar_type(), [&](auto element) {
    using A = decltype(element);
    PAPER_LAYERS_DISPATCH(soft_triple_add_centers(problem, centers.const_data_ptr<A>(), inverse.const_data_ptr<A>(),
                                                  projection.const_data_ptr<A>(), pull.const_data_ptr<A>(),
                                                  *grad_distance.const_data_ptr<A>(), grad.mutable_data_ptr<A>()));
  });
}

std::tuple<Tensor, Tensor> soft_triple_chunk_forward(const Tensor& scores, Tensor inverse, Tensor labels,
                                                     int64_t first, double la, double gamma, double margin) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, inverse);
  check_labels(labels, chunk, scores);
  make_contiguous(inverse, labels);
  Tensor logsumexp = new_empty(scores, {chunk.rows}), target = new_zeros(scores, {chunk.rows});
  dispatch_accumulator(scores.scalar_type(), [&](auto element) {
    using A = decltype(element);
    PAPER_LAYERS_DISPATCH(soft_triple_chunk_forward<A>(
        chunk, SoftTripleFactors<A>(la, gamma, margin), scores.const_data_ptr<A>(), inverse.const_data_ptr<A>(),
        labels.const_data_ptr<int64_t>(), first, logsumexp.mutable_data_ptr<A>(), target.mutable_data_ptr<A>()));
  });
  return {logsumexp, target};
}

Tensor soft_triple_chunk_backward(Tensor scores, Tensor inverse, Tensor labels, int64_t first, Tensor logsumexp,
                                  Tensor grad_logsumexp, Tensor grad_target, double la, double gamma, double margin) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, inverse);
  check_chunk_backward(labels, logsumexp, grad_logsumexp, grad_target, chunk, scores);
  make_contiguous(inverse, labels, logsumexp, grad_logsumexp, grad_target);
  Tensor projection = new_empty(scores, {chunk.classes, chunk.centers});
  dispatch_accumulator(scores.scalar_type(), [&](auto element) {
    using A = decltype(element);
    PAPER_LAYERS_DISPATCH(soft_triple_chunk_backward<A>(
        chunk, SoftTripleFactors<A>(la, gamma, margin), scores.mutable_data_ptr<A>(), inverse.const_data_ptr<A>(),
        labels.const_data_ptr<int64_t>(), first, logsumexp.const_data_ptr<A>(), grad_logsumexp.const_data_ptr<A>(),
        grad_target.const_data_ptr<A>(), projection.mutable_data_ptr<A>()));
  });
  return projection;
}

Tensor soft_triple_reduce(const Tensor& others, const Tensor& target, const Tensor& distance,
                          std::optional<Tensor> weights, const Tensor& labels, double regulariser,
                          std::string reduction) {
  const RowTensors tensors(others, target, distance, weights, labels, regulariser, reduction);
  return tensors.forward([](const auto& rows) {
    RowTotals totals;
    for (int64_t i = 0; i < rows.problem.rows; ++i) rows.add_forward(i, &totals);
    rows.finish_forward(totals);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_triple_reduce_backward(
    const Tensor& grad, const Tensor& others, const Tensor& target, const Tensor& distance,
    std::optional<Tensor> weights, const Tensor& labels, double regulariser, std::string reduction) {
  const RowTensors tensors(others, target, distance, weights, labels, regulariser, reduction);
  return tensors.backward(grad, [](const auto& rows) {
    RowTotals totals;
    for (int64_t i = 0; i < rows.problem.rows; ++i) rows.add_backward(i, &totals);
    for (int64_t i = 0; i < rows.problem.rows; ++i) rows.backward(i, totals);
    rows.finish_backward(totals);
  });
}

Tensor soft_triple_similarity(const Tensor& scores, Tensor inverse, double gamma) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, inverse);
  make_contiguous(inverse);
  Tensor similarity = new_empty(scores, {chunk.classes, chunk.rows});
  dispatch_accumulator(scores.scalar_type(), [&](auto element) {
    using A = decltype(element);
    PAPER_LAYERS_DISPATCH(soft_triple_similarity<A>(chunk, static_cast<A>(1 / gamma), scores.const_data_ptr<A>(),
                                                    inverse.const_data_ptr<A>(), similarity.mutable_data_ptr<A>()));
  });
  return similarity;
}

Tensor soft_triple_similarity_backward(Tensor scores, Tensor inverse, Tensor grad, double gamma) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, inverse);
  check_tensor("grad", grad, {chunk.classes, chunk.rows}, scores);
  make_contiguous(inverse, grad);
  Tensor projection = new_empty(scores, {chunk.classes, chunk.centers});
  dispatch_accumulator(scores.scalar_type(), [&](auto element) {
    using A = decltype(element);
    PAPER_LAYERS_DISPATCH(soft_triple_similarity_backward<A>(
        chunk, static_cast<A>(1 / gamma), scores.mutable_data_ptr<A>(), inverse.const_data_ptr<A>(),
        grad.const_data_ptr<A>(), projection.mutable_data_ptr<A>()));
  });
  return projection;
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("soft_triple", TORCH_BOX(&paper_layers::soft_triple));
  m.impl("soft_triple_backward", TORCH_BOX(&paper_layers::soft_triple_backward));
  m.impl("soft_triple_logits", TORCH_BOX(&paper_layers::soft_triple_logits));
  m.impl("soft_triple_logits_backward", TORCH_BOX(&paper_layers::soft_triple_logits_backward));
  m.impl("soft_triple_centers", TORCH_BOX(&paper_layers::soft_triple_centers));
  m.impl("soft_triple_add_centers_", TORCH_BOX(&paper_layers::soft_triple_add_centers));
  m.impl("soft_triple_chunk", TORCH_BOX(&paper_layers::soft_triple_chunk_forward));
  m.impl("soft_triple_chunk_backward_", TORCH_BOX(&paper_layers::soft_triple_chunk_backward));
  m.impl("soft_triple_reduce", TORCH_BOX(&paper_layers::soft_triple_reduce));
  m.impl("soft_triple_reduce_backward", TORCH_BOX(&paper_layers::soft_triple_reduce_backward));
  m.impl("soft_triple_similarity", TORCH_BOX(&paper_layers::soft_triple_similarity));
  m.impl("soft_triple_similarity_backward_", TORCH_BOX(&paper_layers::soft_triple_similarity_backward));
}
