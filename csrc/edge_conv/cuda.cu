// The CUDA kernels of EdgeConv's edge pass.
//
// Forward: a thread takes a pack of channels of every so many nodes; their number is fixed, and their sums are added in
// order. Backward: the same for the nodes, which find again what edge they kept; then each row of neighbour terms
// gathers from the edges that lead to it. No atomics, so results do not vary from run to run.

#include "common/reverse_table.cuh"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "edge_conv/cuda_kernel.cuh"
#include "edge_conv/problem.h"

namespace paper_layers {
namespace {

// Partial sums of so many numbers.
constexpr int64_t kPartials = 1 << 18;

int64_t worker_count(const EdgeConvProblem& problem) {
  const int64_t most = std::max<int64_t>(64, kPartials / std::max<int64_t>(1, problem.channels));
  return std::max<int64_t>(1, std::min(problem.nodes, most));
}

Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

Tensor sum_of_workers(const Tensor& partials) {
  const std::vector<int64_t> first = {0};
  return torch::stable::sum(partials, first);
}

template <typename T, typename R>
Graph<T, R> graph(const R& rows, const EdgeConvProblem& problem, const Tensor& center, const Tensor& neighbor,
                  const Tensor& index, const Tensor& slope) {
  // Without rows nobody has neighbours.
  return {rows,
          {index.const_data_ptr<int64_t>(), problem.rows > 0 ? problem.k : 0, problem.rows},
          problem.nodes,
          packs<T, R::V>(center),
          packs<T, R::V>(neighbor),
          slope.const_data_ptr<Accumulator<T>>()};
}

std::tuple<Tensor, Tensor, Tensor> edge_conv(const Tensor& any_center, const Tensor& any_neighbor,
                                             const Tensor& any_index, const Tensor& slope,
                                             std::optional<Tensor> any_smallest, bool statistics) {
  const EdgeConvProblem problem = edge_conv_problem(any_center, any_neighbor, any_index, slope, any_smallest);
  const int32_t device = any_center.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor center = torch::stable::contiguous(any_center), neighbor = torch::stable::contiguous(any_neighbor);
  const Tensor index = torch::stable::contiguous(any_index);
  const Tensor smallest = any_smallest ? torch::stable::contiguous(*any_smallest) : index;
  const int64_t workers = worker_count(problem), wanted = statistics ? problem.channels : 0;
  const Tensor output = empty(center, {problem.nodes, problem.channels}, center.scalar_type());
  const Tensor mean = empty(slope, {wanted}, slope.scalar_type()), var = empty(slope, {wanted}, slope.scalar_type());
  if (output.numel() == 0) return {output, torch::stable::fill_(mean, 0), torch::stable::fill_(var, 0)};
  const Tensor sums = empty(center, {statistics ? workers : 0, 2, wanted}, ScalarType::Double);
  const Tensor counts = empty(center, {statistics ? workers : 0}, ScalarType::Double);
  with_dtype(center.scalar_type(), [&](auto element) {
    using T = decltype(element);
    with_rows<T>(workers * problem.channels, problem.channels, {center, neighbor, output}, [&](auto rows) {
      using R = decltype(rows);
      const Graph<T, R> edges = graph<T>(rows, problem, center, neighbor, index, slope);
      const bool* least = any_smallest ? smallest.const_data_ptr<bool>() : nullptr;
      Pack<T, R::V>* const to = mutable_packs<T, R::V>(output);
      if (!statistics) {
        for_each_index<typename R::Index>(workers * rows.packs, device,
                                          EdgeForward<T, R, false>{edges, workers, least, to, nullptr, nullptr});
        return;
      }
      for_each_index<typename R::Index>(
          workers * rows.packs, device,
          EdgeForward<T, R, true>{edges, workers, least, to, sums.mutable_data_ptr<double>(),
                                  counts.mutable_data_ptr<double>()});
      const Tensor total = sum_of_workers(sums), count = sum_of_workers(counts);
      for_each_index<typename R::Index>(
          rows.packs, device,
          Statistics<T, R>{edges, total.const_data_ptr<double>(), count.const_data_ptr<double>(),
                           mean.mutable_data_ptr<Accumulator<T>>(), var.mutable_data_ptr<Accumulator<T>>()});
    });
  });
  return {output, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> edge_conv_backward(const Tensor& any_grad, const Tensor& any_grad_mean,
                                                      const Tensor& any_grad_var, const Tensor& any_center,
                                                      const Tensor& any_neighbor, const Tensor& any_index,
                                                      const Tensor& slope, const Tensor& any_output,
                                                      const Tensor& any_mean) {
  const EdgeConvProblem problem = edge_conv_backward_problem(any_grad, any_grad_mean, any_grad_var, any_center,
                                                             any_neighbor, any_index, slope, any_output, any_mean);
  const int32_t device = any_center.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto dense = [](const Tensor& tensor) { return torch::stable::contiguous(tensor); };
  const Tensor grad = dense(any_grad), grad_mean = dense(any_grad_mean), grad_var = dense(any_grad_var);
  const Tensor center = dense(any_center), neighbor = dense(any_neighbor), index = dense(any_index);
  const Tensor output = dense(any_output), mean = dense(any_mean);
  const int64_t workers = worker_count(problem);
  const Tensor grad_center = torch::stable::empty_like(center), grad_neighbor = torch::stable::empty_like(neighbor);
  if (center.numel() == 0) {
    const Tensor none = empty(slope, {}, slope.scalar_type());
    return {grad_center, torch::stable::fill_(grad_neighbor, 0), torch::stable::fill_(none, 0)};
  }
  const Tensor arg = empty(center, {problem.nodes, problem.channels}, ScalarType::Int);
  const Tensor counts = empty(center, {workers}, ScalarType::Double);
  const CountEdges count_edges{index.const_data_ptr<int64_t>(), index.numel(), workers,
                               counts.mutable_data_ptr<double>()};
  for_each_index<int64_t>(workers, device, count_edges);
  const Tensor count = sum_of_workers(counts);
  const ReverseTable reverse =
      reverse_table(center, index.numel(), problem.rows, RowOfEdge{index.const_data_ptr<int64_t>()});
  std::optional<Tensor> grad_slope;
  with_dtype(center.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t largest = std::max({workers * problem.channels, problem.rows * problem.channels, index.numel()});
    const std::initializer_list<Tensor> tensors = {grad, center, neighbor, output, arg, grad_center, grad_neighbor};
    with_rows<T>(largest, problem.channels, tensors, [&](auto rows) {
      using R = decltype(rows);
      constexpr int V = R::V;
      const Graph<T, R> edges = graph<T>(rows, problem, center, neighbor, index, slope);
      const EdgeGradients<A> gradients{mean.numel() > 0 ? mean.const_data_ptr<A>() : nullptr,
                                       grad_mean.const_data_ptr<A>(), grad_var.const_data_ptr<A>(),
                                       count.const_data_ptr<double>()};
      const Tensor slopes = empty(center, {workers * rows.packs}, ScalarType::Double);
      for_each_index<typename R::Index>(
          workers * rows.packs, device,
          EdgeBackwardCenter<T, R>{edges, gradients, workers, packs<T, V>(grad), packs<T, V>(output),
                                   mutable_packs<T, V>(grad_center), mutable_packs<int32_t, V>(arg),
                                   slopes.mutable_data_ptr<double>()});
      for_each_index<typename R::Index>(
          problem.rows * rows.packs, device,
          EdgeBackwardNeighbor<T, R>{edges, gradients, Divider<typename R::Index>(std::max<int64_t>(problem.k, 1)),
                                     reverse.edge_data(), reverse.start_data(), packs<T, V>(grad),
                                     packs<int32_t, V>(arg), mutable_packs<T, V>(grad_neighbor)});
      grad_slope = torch::stable::to(sum_of_workers(slopes), slope.scalar_type());
    });
  });
  return {grad_center, grad_neighbor, *grad_slope};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CUDA, m) {
  m.impl("edge_conv", TORCH_BOX(&edge_conv));
  m.impl("edge_conv_backward", TORCH_BOX(&edge_conv_backward));
}

}  // namespace paper_layers
