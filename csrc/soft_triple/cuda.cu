// SoftTriple between the matrix products on the GPU. Sums over the batch and over classes are made of parts that are
// added in order: no atomics, so results do not vary from run to run.

#include "common/cuda_utils.cuh"

#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include "soft_triple/cuda_kernel.cuh"
#include "soft_triple/problem.h"

namespace paper_layers {
namespace {

// Calls function with an element of the dtype.
template <typename Function>
void with_dtype(const Tensor& tensor, Function function) {
  THO_DISPATCH_V2(tensor.scalar_type(), "soft_triple", AT_WRAP([&] { function(scalar_t{}); }),
                  AT_EXPAND(AT_FLOATING_TYPES));
}

Tensor empty(const Tensor& like, std::vector<int64_t> shape) { return torch::stable::new_empty(like, shape); }
Tensor zeros(const Tensor& like, std::vector<int64_t> shape) { return torch::stable::new_zeros(like, shape); }
Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }
Tensor sum_of_first(const Tensor& tensor) {
  const std::vector<int64_t> first = {0};
  return torch::stable::sum(tensor, first);
}

Tensor soft_triple_labels(const Tensor& any_labels, int64_t classes, int64_t ignore_index) {
  STD_TORCH_CHECK(any_labels.scalar_type() == ScalarType::Long, "labels: expected int64, got ",
                  any_labels.scalar_type());
  const int32_t device = any_labels.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor labels = dense(any_labels);
  Tensor result = torch::stable::empty_like(labels);
  for_each_index<int64_t>(labels.numel(), device, KnownLabel{labels.const_data_ptr<int64_t>(), classes, ignore_index,
                                                             result.mutable_data_ptr<int64_t>()});
  return result;
}

std::tuple<Tensor, Tensor, Tensor> soft_triple_centers(const Tensor& any_centers, bool distances) {
  const SoftTripleCenters problem = soft_triple_centers_problem(any_centers, distances);
  const int32_t device = any_centers.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor centers = dense(any_centers);
  const int64_t classes = problem.classes, count = problem.centers;
  const std::vector<int64_t> per_class = {classes};
  Tensor inverse = empty(centers, {classes, count});
  Tensor products = distances ? empty(centers, {classes, count, count}) : empty(centers, {classes, count});
  Tensor sums = torch::stable::new_empty(centers, per_class, ScalarType::Double);
  with_dtype(centers, [&](auto element) {
    using A = decltype(element);
    A* const data = products.mutable_data_ptr<A>();
    for_each_index<int64_t>(products.numel() * kWarp, device,
                            CenterProducts<A>{problem, centers.const_data_ptr<A>(), data});
    for_each_index<int64_t>(
        classes, device,
        CentersOfClass<A>{problem, data, inverse.mutable_data_ptr<A>(), sums.mutable_data_ptr<double>()});
  });
  const Tensor distance = torch::stable::to(sum_of_first(sums), centers.scalar_type());
  return {inverse, distance, distances ? products : empty(centers, {0})};
}

void soft_triple_add_centers(Tensor grad, const Tensor& any_centers, const Tensor& any_inverse,
                             const Tensor& any_projection, const Tensor& any_pull, const Tensor& grad_distance) {
  const SoftTripleCenters problem =
      soft_triple_add_centers_problem(grad, any_centers, any_inverse, any_projection, any_pull, grad_distance);
  const int32_t device = grad.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor centers = dense(any_centers), inverse = dense(any_inverse), projection = dense(any_projection),
               pull = dense(any_pull);
  with_dtype(centers, [&](auto element) {
    using A = decltype(element);
    for_each_index<int64_t>(problem.classes * problem.channels, device,
                            AddCenters<A>{problem, centers.const_data_ptr<A>(), inverse.const_data_ptr<A>(),
                                          projection.const_data_ptr<A>(), pull.const_data_ptr<A>(),
                                          grad_distance.const_data_ptr<A>(), grad.mutable_data_ptr<A>()});
  });
}

std::tuple<Tensor, Tensor> soft_triple_chunk_forward(const Tensor& scores, const Tensor& any_inverse,
                                                     const Tensor& any_labels, int64_t first, double la, double gamma,
                                                     double margin) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, any_inverse);
  check_labels(any_labels, chunk, scores);
  const int32_t device = scores.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor inverse = dense(any_inverse), labels = dense(any_labels);
  const int64_t parts = (chunk.classes + kClassesPerThread - 1) / kClassesPerThread;
  Tensor logsumexp = empty(scores, {chunk.rows}), target = zeros(scores, {chunk.rows});
  Tensor partials = empty(scores, {parts, 2, chunk.rows});
  with_dtype(scores, [&](auto element) {
    using A = decltype(element);
    for_each_index<int64_t>(
        parts * chunk.rows, device,
        PartialLogSumExp<A>{chunk, SoftTripleFactors<A>(la, gamma, margin), scores.const_data_ptr<A>(),
                            inverse.const_data_ptr<A>(), labels.const_data_ptr<int64_t>(), first,
                            partials.mutable_data_ptr<A>(), target.mutable_data_ptr<A>()});
    for_each_index<int64_t>(
        chunk.rows, device,
        CombineLogSumExps<A>{parts, chunk.rows, partials.const_data_ptr<A>(), logsumexp.mutable_data_ptr<A>()});
  });
  return {logsumexp, target};
}

template <typename A, typename Gradient>
Tensor replace_by_gradients(const SoftTripleChunk& chunk, A per_gamma, Tensor& scores, const Tensor& inverse,
                            const Gradient& gradient) {
  const int64_t tiles = (chunk.rows + kWarp - 1) / kWarp;
  Tensor projections = empty(scores, {tiles, chunk.classes, chunk.centers});
  for_each_index<int64_t>(
      tiles * chunk.classes * kWarp, scores.get_device_index(),
      ReplaceByGradients<A, Gradient>{chunk, per_gamma, gradient, scores.mutable_data_ptr<A>(),
                                      inverse.const_data_ptr<A>(), projections.mutable_data_ptr<A>()});
  return sum_of_first(projections);
}

Tensor soft_triple_chunk_backward(Tensor scores, const Tensor& any_inverse, const Tensor& any_labels, int64_t first,
                                  const Tensor& any_logsumexp, const Tensor& any_grad_logsumexp,
                                  const Tensor& any_grad_target, double la, double gamma, double margin) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, any_inverse);
  check_chunk_backward(any_labels, any_logsumexp, any_grad_logsumexp, any_grad_target, chunk, scores);
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const Tensor inverse = dense(any_inverse), labels = dense(any_labels), logsumexp = dense(any_logsumexp),
               grad_logsumexp = dense(any_grad_logsumexp), grad_target = dense(any_grad_target);
  Tensor projection;
  with_dtype(scores, [&](auto element) {
    using A = decltype(element);
    const SoftTripleFactors<A> factors(la, gamma, margin);
    projection = replace_by_gradients<A>(
        chunk, factors.per_gamma, scores, inverse,
        LossGradient<A>{chunk.rows, chunk.classes, factors, labels.const_data_ptr<int64_t>(), first, logsumexp.const_data_ptr<A>(),
                        grad_logsumexp.const_data_ptr<A>(), grad_target.const_data_ptr<A>()});
  });
  return projection;
}

Tensor soft_triple_similarity(const Tensor& scores, const Tensor& any_inverse, double gamma) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, any_inverse);
  const int32_t device = scores.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor inverse = dense(any_inverse);
  Tensor similarity = empty(scores, {chunk.classes, chunk.rows});
  with_dtype(scores, [&](auto element) {
    using A = decltype(element);
    for_each_index<int64_t>(similarity.numel(), device,
                            Similarity<A>{chunk, static_cast<A>(1 / gamma), scores.const_data_ptr<A>(),
                                          inverse.const_data_ptr<A>(), similarity.mutable_data_ptr<A>()});
  });
  return similarity;
}

Tensor soft_triple_similarity_backward(Tensor scores, const Tensor& any_inverse, const Tensor& any_grad,
                                       double gamma) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, any_inverse);
  const std::vector<int64_t> shape = {chunk.classes, chunk.rows};
  check_tensor("grad", any_grad, shape, scores);
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const Tensor inverse = dense(any_inverse), grad = dense(any_grad);
  Tensor projection;
  with_dtype(scores, [&](auto element) {
    using A = decltype(element);
    projection = replace_by_gradients<A>(chunk, static_cast<A>(1 / gamma), scores, inverse,
                                         GivenGradient<A>{chunk.rows, grad.const_data_ptr<A>()});
  });
  return projection;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CUDA, m) {
  m.impl("soft_triple_labels", TORCH_BOX(&soft_triple_labels));
  m.impl("soft_triple_centers", TORCH_BOX(&soft_triple_centers));
  m.impl("soft_triple_add_centers_", TORCH_BOX(&soft_triple_add_centers));
  m.impl("soft_triple_chunk", TORCH_BOX(&soft_triple_chunk_forward));
  m.impl("soft_triple_chunk_backward_", TORCH_BOX(&soft_triple_chunk_backward));
  m.impl("soft_triple_similarity", TORCH_BOX(&soft_triple_similarity));
  m.impl("soft_triple_similarity_backward_", TORCH_BOX(&soft_triple_similarity_backward));
}

}  // namespace paper_layers
