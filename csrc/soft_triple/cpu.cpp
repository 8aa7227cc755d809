// SoftTriple between the matrix products on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <numeric>
#include <tuple>

#include "common/matrix_view.h"
#include "soft_triple/problem.h"

#define PAPER_LAYERS_KERNEL "soft_triple/cpu_kernel.isa.h"
#include "common/for_each_isa.h"
#include "soft_triple/cpu_loss.h"

namespace paper_layers {
namespace {

std::tuple<Tensor, Tensor, Tensor> soft_triple_centers(const Tensor& any_centers, bool distances) {
  const SoftTripleCenters problem = soft_triple_centers_problem(any_centers, distances);
  const Tensor centers = dense(any_centers);
  const int64_t classes = problem.classes, count = problem.centers;
  Tensor inverse = empty(centers, {classes, count}), distance = empty(centers, {});
  Tensor pull = distances ? empty(centers, {classes, count, count}) : empty(centers, {0});
  with_dtype(centers.scalar_type(), [&](auto element) {
    using A = decltype(element);
    PAPER_LAYERS_DISPATCH(soft_triple_centers(problem, centers.const_data_ptr<A>(), inverse.mutable_data_ptr<A>(),
                                              distance.mutable_data_ptr<A>(), pull.mutable_data_ptr<A>()));
  });
  return {inverse, distance, pull};
}

void soft_triple_add_centers(Tensor grad, const Tensor& any_centers, const Tensor& any_inverse,
                             const Tensor& any_projection, const Tensor& any_pull, const Tensor& grad_distance) {
  const SoftTripleCenters problem =
      soft_triple_add_centers_problem(grad, any_centers, any_inverse, any_projection, any_pull, grad_distance);
  if (grad.numel() == 0) return;
  const Tensor centers = dense(any_centers), inverse = dense(any_inverse),
               projection = dense(any_projection), pull = dense(any_pull);
  with_dtype(centers.scalar_type(), [&](auto element) {
    using A = decltype(element);
    PAPER_LAYERS_DISPATCH(soft_triple_add_centers(problem, centers.const_data_ptr<A>(), inverse.const_data_ptr<A>(),
                                                  projection.const_data_ptr<A>(), pull.const_data_ptr<A>(),
                                                  *grad_distance.const_data_ptr<A>(), grad.mutable_data_ptr<A>()));
  });
}

std::tuple<Tensor, Tensor> soft_triple_chunk_forward(const Tensor& scores, const Tensor& any_inverse,
                                                     const Tensor& any_labels, int64_t first, double la, double gamma,
                                                     double margin) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, any_inverse);
  check_labels(any_labels, chunk, scores);
  const Tensor inverse = dense(any_inverse), labels = dense(any_labels);
  Tensor logsumexp = empty(scores, {chunk.rows}), target = empty(scores, {chunk.rows});
  torch::stable::zero_(target);
  with_dtype(scores.scalar_type(), [&](auto element) {
    using A = decltype(element);
    PAPER_LAYERS_DISPATCH(soft_triple_chunk_forward<A>(
        chunk, SoftTripleFactors<A>(la, gamma, margin), scores.const_data_ptr<A>(), inverse.const_data_ptr<A>(),
        labels.const_data_ptr<int64_t>(), first, logsumexp.mutable_data_ptr<A>(), target.mutable_data_ptr<A>()));
  });
  return {logsumexp, target};
}

Tensor soft_triple_chunk_backward(Tensor scores, const Tensor& any_inverse, const Tensor& any_labels, int64_t first,
                                  const Tensor& any_logsumexp, const Tensor& any_grad_logsumexp,
                                  const Tensor& any_grad_target, double la, double gamma, double margin) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, any_inverse);
  check_chunk_backward(any_labels, any_logsumexp, any_grad_logsumexp, any_grad_target, chunk, scores);
  const Tensor inverse = dense(any_inverse), labels = dense(any_labels), logsumexp = dense(any_logsumexp),
               grad_logsumexp = dense(any_grad_logsumexp), grad_target = dense(any_grad_target);
  Tensor projection = empty(scores, {chunk.classes, chunk.centers});
  with_dtype(scores.scalar_type(), [&](auto element) {
    using A = decltype(element);
    PAPER_LAYERS_DISPATCH(soft_triple_chunk_backward<A>(
        chunk, SoftTripleFactors<A>(la, gamma, margin), scores.mutable_data_ptr<A>(), inverse.const_data_ptr<A>(),
        labels.const_data_ptr<int64_t>(), first, logsumexp.const_data_ptr<A>(), grad_logsumexp.const_data_ptr<A>(),
        grad_target.const_data_ptr<A>(), projection.mutable_data_ptr<A>()));
  });
  return projection;
}

// The loss of a row, log(1 + e^excess), and its slope, where the log-sum-exp of the other classes exceeds the target.
template <typename A>
void cross_entropy(A excess, A* loss, A* slope) {
  const A small = std::exp(-std::abs(excess)), one = 1;  // at most 1
  *loss = (excess > 0 ? excess : excess == excess ? A(0) : excess) + std::log1p(small);
  *slope = (excess > 0 ? one : small) / (one + small);
}

std::tuple<Tensor, Tensor> soft_triple_cross_entropy(const Tensor& any_others, const Tensor& any_target) {
  check_tensor("target", any_target, any_others.sizes(), any_others);
  const Tensor others = dense(any_others), target = dense(any_target);
  Tensor loss = torch::stable::empty_like(others), slope = torch::stable::empty_like(others);
  with_dtype(others.scalar_type(), [&](auto element) {
    using A = decltype(element);
    const A *const excess = others.const_data_ptr<A>(), *const than = target.const_data_ptr<A>();
    A *const losses = loss.mutable_data_ptr<A>(), *const slopes = slope.mutable_data_ptr<A>();
    for (int64_t i = 0; i < others.numel(); ++i) cross_entropy(excess[i] - than[i], losses + i, slopes + i);
  });
  return {loss, slope};
}

Tensor soft_triple_similarity(const Tensor& scores, const Tensor& any_inverse, double gamma) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, any_inverse);
  const Tensor inverse = dense(any_inverse);
  Tensor similarity = empty(scores, {chunk.classes, chunk.rows});
  with_dtype(scores.scalar_type(), [&](auto element) {
    using A = decltype(element);
    PAPER_LAYERS_DISPATCH(soft_triple_similarity<A>(chunk, static_cast<A>(1 / gamma), scores.const_data_ptr<A>(),
                                                    inverse.const_data_ptr<A>(), similarity.mutable_data_ptr<A>()));
  });
  return similarity;
}

Tensor soft_triple_similarity_backward(Tensor scores, const Tensor& any_inverse, const Tensor& any_grad,
                                       double gamma) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, any_inverse);
  const std::vector<int64_t> shape = {chunk.classes, chunk.rows};
  check_tensor("grad", any_grad, shape, scores);
  const Tensor inverse = dense(any_inverse), grad = dense(any_grad);
  Tensor projection = empty(scores, {chunk.classes, chunk.centers});
  with_dtype(scores.scalar_type(), [&](auto element) {
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
  m.impl("soft_triple_cross_entropy", TORCH_BOX(&paper_layers::soft_triple_cross_entropy));
  m.impl("soft_triple_similarity", TORCH_BOX(&paper_layers::soft_triple_similarity));
  m.impl("soft_triple_similarity_backward_", TORCH_BOX(&paper_layers::soft_triple_similarity_backward));
}
