// The CUDA kernels of reductions over neighbours' rows.
//
// Forward: a thread a pack of a node's channels. Backward: the edges are sorted by the row that they lead to, and each
// row gathers from its own, in order: no atomics, so results do not vary from run to run.

#include "common/reverse_table.cuh"

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "neighbor_reduce/cuda_kernel.cuh"
#include "neighbor_reduce/problem.h"

namespace paper_layers {
namespace {

std::tuple<Tensor, Tensor> neighbor_reduce(Tensor input, Tensor index, std::string reduce, bool relative) {
  const NeighborReduceProblem problem = neighbor_reduce_problem("input", input, index, input.dim() > 1 ? input.size(-2) : 0, reduce, relative);
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  make_contiguous(input, index);
  const Tensor output = new_empty(input, with_row_count(input, problem.cloud_nodes)), arg = new_arg(input, problem);
  if (output.numel() == 0) return {output, arg};
  const NeighborRows neighbors(index.const_data_ptr<int64_t>(), problem);
  dispatch(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    with_rows<T>(problem.nodes * problem.channels, problem.channels, {input, output, arg}, [&](auto rows) {
      using R = decltype(rows);
      constexpr int V = R::V;
      const int64_t count = problem.nodes * rows.packs;
      if (problem.has_arg()) {
        for_each_index<typename R::Index>(
            count, device,
            Extreme<T, R>{rows, neighbors, problem.reduce == Reduce::max, relative, packs<T, V>(input),
                          mutable_packs<T, V>(output), mutable_packs<int32_t, V>(arg)});
      } else {
        for_each_index<typename R::Index>(count, device,
                                          Total<T, R>{rows, neighbors, problem.reduce == Reduce::mean, relative,
                                                      packs<T, V>(input), mutable_packs<T, V>(output)});
      }
    });
  });
  return {output, arg};
}

Tensor neighbor_reduce_backward(Tensor grad, Tensor index, Tensor arg, int64_t rows, std::string reduce,
                                bool relative) {
  const NeighborReduceProblem problem = neighbor_reduce_backward_problem(grad, index, arg, rows, reduce, relative);
  const int32_t device = grad.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  make_contiguous(grad, index, arg);
  const Tensor grad_input = new_empty(grad, with_row_count(grad, rows));
  if (grad_input.numel() == 0 || grad.numel() == 0) return torch::stable::fill_(grad_input, 0);
  const RowOfEdge row_of(index.const_data_ptr<int64_t>(), problem);
  const ReverseTable reverse = reverse_table(grad, index.numel(), problem.rows, row_of);
  const bool counted = problem.reduce == Reduce::mean || (relative && !problem.has_arg());
  const Tensor counts = new_empty(grad, {problem.nodes}, accumulation_dtype(grad.scalar_type()));
  dispatch(grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    A* count = counted ? counts.mutable_data_ptr<A>() : nullptr;
    if (counted) for_each_index<int64_t>(problem.nodes, device, CountNeighbors<A>{row_of.index, problem.k, count});
    const int64_t largest = std::max(grad_input.numel(), index.numel());
    with_rows<T>(largest, problem.channels, {grad, arg, grad_input}, [&](auto packed) {
      using R = decltype(packed);
      constexpr int V = R::V;
      const Gather<T, R> body{packed,
                              Divider<typename R::Index>(std::max<int64_t>(problem.k, 1)),
                              problem.k,
                              problem.reduce == Reduce::mean,
                              relative,
                              reverse.edge_data(),
                              reverse.start_data(),
                              packs<T, V>(grad),
                              problem.has_arg() ? packs<int32_t, V>(arg) : nullptr,
                              count,
                              mutable_packs<T, V>(grad_input)};
      for_each_index<typename R::Index>(problem.rows * packed.packs, device, body);
    });
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CUDA, m) {
  m.impl("neighbor_reduce", TORCH_BOX(&neighbor_reduce));
  m.impl("neighbor_reduce_backward", TORCH_BOX(&neighbor_reduce_backward));
}

}  // namespace paper_layers
