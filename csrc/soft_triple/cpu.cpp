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

// The loss of a row, log(1 + e^excess), and its slope, where the log-sum-exp of the other classes exceeds the target.
template <typename A>
void cross_entropy(A excess, A* loss, A* slope) {
  const A small = std::exp(-std::abs(excess)), one = 1;  // at most 1
  *loss = (excess > 0 ? excess : excess == excess ? A(0) : excess) + std::log1p(small);
  *slope = (excess > 0 ? one : small) / (one + small);
}

std::tuple<Tensor, Tensor> soft_triple_cross_entropy(Tensor others, Tensor target) {
  check_tensor("target", target, others.sizes(), others);
  make_contiguous(others, target);
  Tensor loss = empty_like(others), slope = empty_like(others);
  dispatch_accumulator(others.scalar_type(), [&](auto element) {
    using A = decltype(element);
    const A *const excess = others.const_data_ptr<A>(), *const than = target.const_data_ptr<A>();
    A *const losses = loss.mutable_data_ptr<A>(), *const slopes = slope.mutable_data_ptr<A>();
    for (int64_t i = 0; i < others.numel(); ++i) cross_entropy(excess[i] - than[i], losses + i, slopes + i);
  });
  return {loss, slope};
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
  m.impl("soft_triple_cross_entropy", TORCH_BOX(&paper_layers::soft_triple_cross_entropy));
  m.impl("soft_triple_similarity", TORCH_BOX(&paper_layers::soft_triple_similarity));
  m.impl("soft_triple_similarity_backward_", TORCH_BOX(&paper_layers::soft_triple_similarity_backward));
}
