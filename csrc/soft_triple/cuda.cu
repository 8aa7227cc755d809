// SoftTriple between the matrix products on the GPU. Sums over the batch and over classes are made of parts that are
// added in order: no atomics, so results do not vary from run to run.

#include "common/cuda_utils.cuh"

#include <tuple>

#include <torch/csrc/stable/library.h>

#include "soft_triple/cuda_kernel.cuh"
#include "soft_triple/problem.h"

namespace paper_layers {
namespace {

Tensor soft_triple_labels(Tensor labels, int64_t classes, int64_t ignore_index) {
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "labels: expected int64, got ", labels.scalar_type());
  const int32_t device = labels.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  make_contiguous(labels);
  Tensor result = empty_like(labels);
  for_each_index<int64_t>(labels.numel(), device, KnownLabel{labels.const_data_ptr<int64_t>(), classes, ignore_index,
                                                             result.mutable_data_ptr<int64_t>()});
  return result;
}

std::tuple<Tensor, Tensor, Tensor> soft_triple_centers(Tensor centers, bool distances) {
  const SoftTripleCenters problem = soft_triple_centers_problem(centers, distances);
  const int32_t device = centers.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  make_contiguous(centers);
  const int64_t classes = problem.classes, count = problem.centers;
  Tensor inverse = new_empty(centers, {classes, count});
  Tensor products = distances ? new_empty(centers, {classes, count, count}) : new_empty(centers, {classes, count});
  Tensor sums = new_empty(centers, {classes}, ScalarType::Double);
  dispatch_accumulator(centers.scalar_type(), [&](auto element) {
    using A = decltype(element);
    A* const data = products.mutable_data_ptr<A>();
    for_each_index<int64_t>(products.numel() * kWarp, device,
                            CenterProducts<A>{problem, centers.const_data_ptr<A>(), data});
    for_each_index<int64_t>(
        classes, device,
        CentersOfClass<A>{problem, data, inverse.mutable_data_ptr<A>(), sums.mutable_data_ptr<double>()});
  });
  const Tensor distance = to_dtype(sum_over(sums, 0), centers.scalar_type());
  return {inverse, distance, distances ? products : new_empty(centers, {0})};
}

void soft_triple_add_centers(Tensor grad, Tensor centers, Tensor inverse, Tensor projection, Tensor pull,
                             const Tensor& grad_distance) {
  const SoftTripleCenters problem =
      soft_triple_add_centers_problem(grad, centers, inverse, projection, pull, grad_distance);
  const int32_t device = grad.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  make_contiguous(centers, inverse, projection, pull);
  dispatch_accumulator(centers.scalar_type(), [&](auto element) {
    using A = decltype(element);
    for_each_index<int64_t>(problem.classes * problem.channels, device,
                            AddCenters<A>{problem, centers.const_data_ptr<A>(), inverse.const_data_ptr<A>(),
                                          projection.const_data_ptr<A>(), pull.const_data_ptr<A>(),
                                          grad_distance.const_data_ptr<A>(), grad.mutable_data_ptr<A>()});
  });
}

std::tuple<Tensor, Tensor> soft_triple_chunk_forward(const Tensor& scores, Tensor inverse, Tensor labels,
                                                     int64_t first, double la, double gamma, double margin) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, inverse);
  check_labels(labels, chunk, scores);
  const int32_t device = scores.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  make_contiguous(inverse, labels);
  const int64_t parts = (chunk.classes + kClassesPerThread - 1) / kClassesPerThread;
  Tensor logsumexp = new_empty(scores, {chunk.rows}), target = new_zeros(scores, {chunk.rows});
  Tensor partials = new_empty(scores, {parts, 2, chunk.rows});
  dispatch_accumulator(scores.scalar_type(), [&](auto element) {
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
  Tensor projections = new_empty(scores, {tiles, chunk.classes, chunk.centers});
  for_each_index<int64_t>(
      tiles * chunk.classes * kWarp, scores.get_device_index(),
      ReplaceByGradients<A, Gradient>{chunk, per_gamma, gradient, scores.mutable_data_ptr<A>(),
                                      inverse.const_data_ptr<A>(), projections.mutable_data_ptr<A>()});
  return sum_over(projections, 0);
}

Tensor soft_triple_chunk_backward(Tensor scores, Tensor inverse, Tensor labels, int64_t first, Tensor logsumexp,
                                  Tensor grad_logsumexp, Tensor grad_target, double la, double gamma, double margin) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, inverse);
  check_chunk_backward(labels, logsumexp, grad_logsumexp, grad_target, chunk, scores);
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  make_contiguous(inverse, labels, logsumexp, grad_logsumexp, grad_target);
  Tensor projection;
  dispatch_accumulator(scores.scalar_type(), [&](auto element) {
    using A = decltype(element);
    const SoftTripleFactors<A> factors(la, gamma, margin);
    projection = replace_by_gradients<A>(
        chunk, factors.per_gamma, scores, inverse,
        LossGradient<A>{chunk.rows, chunk.classes, factors, labels.const_data_ptr<int64_t>(), first, logsumexp.const_data_ptr<A>(),
                        grad_logsumexp.const_data_ptr<A>(), grad_target.const_data_ptr<A>()});
  });
  return projection;
}

Tensor soft_triple_similarity(const Tensor& scores, Tensor inverse, double gamma) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, inverse);
  const int32_t device = scores.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  make_contiguous(inverse);
  Tensor similarity = new_empty(scores, {chunk.classes, chunk.rows});
  dispatch_accumulator(scores.scalar_type(), [&](auto element) {
    using A = decltype(element);
    for_each_index<int64_t>(similarity.numel(), device,
                            Similarity<A>{chunk, static_cast<A>(1 / gamma), scores.const_data_ptr<A>(),
                                          inverse.const_data_ptr<A>(), similarity.mutable_data_ptr<A>()});
  });
  return similarity;
}

Tensor soft_triple_similarity_backward(Tensor scores, Tensor inverse, Tensor grad, double gamma) {
  const SoftTripleChunk chunk = soft_triple_chunk(scores, inverse);
  check_tensor("grad", grad, {chunk.classes, chunk.rows}, scores);
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  make_contiguous(inverse, grad);
  Tensor projection;
  dispatch_accumulator(scores.scalar_type(), [&](auto element) {
    using A = decltype(element);
    projection = replace_by_gradients<A>(chunk, static_cast<A>(1 / gamma), scores, inverse,
                                         GivenGradient<A>{chunk.rows, grad.const_data_ptr<A>()});
  });
  return projection;
}

template <bool backward, typename A>
void launch_rows(const Rows<A>& rows, int32_t device) {
  launch(reduce_rows_kernel<A, backward>, 1, kThreads, device, rows);
}

Tensor soft_triple_reduce(const Tensor& others, const Tensor& target, const Tensor& distance,
                          std::optional<Tensor> weights, const Tensor& labels, double regulariser,
                          std::string reduction) {
  const RowTensors tensors(others, target, distance, weights, labels, regulariser, reduction);
  const int32_t device = others.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  return tensors.forward([&](const auto& rows) { launch_rows<false>(rows, device); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_triple_reduce_backward(
    const Tensor& grad, const Tensor& others, const Tensor& target, const Tensor& distance,
    std::optional<Tensor> weights, const Tensor& labels, double regulariser, std::string reduction) {
  const RowTensors tensors(others, target, distance, weights, labels, regulariser, reduction);
  const int32_t device = others.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  return tensors.backward(grad, [&](const auto& rows) { launch_rows<true>(rows, device); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CUDA, m) {
  m.impl("soft_triple_labels", TORCH_BOX(&soft_triple_labels));
  m.impl("soft_triple_centers", TORCH_BOX(&soft_triple_centers));
  m.impl("soft_triple_add_centers_", TORCH_BOX(&soft_triple_add_centers));
  m.impl("soft_triple_chunk", TORCH_BOX(&soft_triple_chunk_forward));
  m.impl("soft_triple_chunk_backward_", TORCH_BOX(&soft_triple_chunk_backward));
  m.impl("soft_triple_reduce", TORCH_BOX(&soft_triple_reduce));
  m.impl("soft_triple_reduce_backward", TORCH_BOX(&soft_triple_reduce_backward));
  m.impl("soft_triple_similarity", TORCH_BOX(&soft_triple_similarity));
  m.impl("soft_triple_similarity_backward_", TORCH_BOX(&soft_triple_similarity_backward));
}

}  // namespace paper_layers
