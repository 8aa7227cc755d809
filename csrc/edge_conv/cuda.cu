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

// The number of partial sums.
constexpr int64_t kPartials = 1 << 18;

int64_t worker_count(const EdgeConvProblem& problem) {
  const int64_t most = std::max<int64_t>(64, kPartials / std::max<int64_t>(1, problem.channels));
  return std::max<int64_t>(1, std::min(problem.nodes, most));
}

template <typename T, typename R>
Graph<T, R> graph(const R& rows, const EdgeConvProblem& problem, const Tensor& center, const Tensor& neighbor,
                  const Tensor& index, const Tensor& slope) {
  // Without rows there are no neighbours.
  return {rows,
          {index.const_data_ptr<int64_t>(), problem.rows > 0 ? problem.k : 0, problem.rows},
          problem.nodes,
          packs<T, R::V>(center),
          packs<T, R::V>(neighbor),
          slope.const_data_ptr<Accumulator<T>>()};
}

std::tuple<Tensor, Tensor, Tensor> edge_conv(Tensor center, Tensor neighbor, Tensor index, const Tensor& slope,
                                             MaybeTensor smallest, bool statistics) {
  const EdgeConvProblem problem = edge_conv_problem(center, neighbor, index, slope, smallest);
  const int32_t device = center.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t workers = worker_count(problem), wanted = statistics ? problem.channels : 0;
  const Tensor output = new_empty(center, {problem.nodes, problem.channels});
  const Tensor mean = new_empty(slope, {wanted}), var = new_empty(slope, {wanted});
  if (output.numel() == 0) return {output, torch::stable::fill_(mean, 0), torch::stable::fill_(var, 0)};
  const Tensor sums = new_empty(center, {statistics ? workers : 0, 2, wanted}, ScalarType::Double);
  const Tensor counts = new_empty(center, {statistics ? workers : 0}, ScalarType::Double);
  dispatch(center.scalar_type(), [&](auto element) {
    using T = decltype(element);
    with_rows<T>(workers * problem.channels, problem.channels, {center, neighbor, output}, [&](auto rows) {
      using R = decltype(rows);
      const Graph<T, R> edges = graph<T>(rows, problem, center, neighbor, index, slope);
      const bool* least = smallest ? smallest->const_data_ptr<bool>() : nullptr;
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
      const Tensor total = sum_over(sums, 0), count = sum_over(counts, 0);
      for_each_index<typename R::Index>(
          rows.packs, device,
          Statistics<T, R>{edges, total.const_data_ptr<double>(), count.const_data_ptr<double>(),
                           mean.mutable_data_ptr<Accumulator<T>>(), var.mutable_data_ptr<Accumulator<T>>()});
    });
  });
  return {output, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> edge_conv_backward(Tensor grad, Tensor grad_mean, Tensor grad_var, Tensor center,
                                                      Tensor neighbor, Tensor index, const Tensor& slope,
                                                      Tensor output, Tensor mean) {
  const EdgeConvProblem problem =
      edge_conv_backward_problem(grad, grad_mean, grad_var, center, neighbor, index, slope, output, mean);
  const int32_t device = center.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t workers = worker_count(problem);
  const Tensor grad_center = empty_like(center), grad_neighbor = empty_like(neighbor);
  if (center.numel() == 0) {
    return {grad_center, torch::stable::fill_(grad_neighbor, 0), torch::stable::fill_(new_empty(slope, {}), 0)};
  }
  const Tensor arg = new_empty(center, {problem.nodes, problem.channels}, ScalarType::Int);
  const Tensor counts = new_empty(center, {workers}, ScalarType::Double);
  const CountEdges count_edges{index.const_data_ptr<int64_t>(), index.numel(), workers,
                               counts.mutable_data_ptr<double>()};
  for_each_index<int64_t>(workers, device, count_edges);
  const Tensor count = sum_over(counts, 0);
  const ReverseTable reverse =
      reverse_table(center, index.numel(), problem.rows, RowOfEdge{index.const_data_ptr<int64_t>()});
  std::optional<Tensor> grad_slope;
  dispatch(center.scalar_type(), [&](auto element) {
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
      const Tensor slopes = new_empty(center, {workers * rows.packs}, ScalarType::Double);
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
      grad_slope = to_dtype(sum_over(slopes, 0), slope.scalar_type());
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
