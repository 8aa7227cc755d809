// The edge pass of EdgeConv on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <optional>
#include <tuple>

#include "edge_conv/problem.h"

#define PAPER_LAYERS_KERNEL "edge_conv/cpu_kernel.isa.h"
#include "common/for_each_isa.h"

namespace paper_layers {
namespace {

std::tuple<Tensor, Tensor, Tensor> edge_conv(Tensor center, Tensor neighbor, Tensor index, const Tensor& slope,
                                             MaybeTensor smallest, bool statistics) {
  const EdgeConvProblem problem = edge_conv_problem(center, neighbor, index, slope, smallest);
  check_index(index.const_data_ptr<int64_t>(), index.numel(), problem.rows);
  const int64_t wanted = statistics ? problem.channels : 0;
  Tensor output = new_empty(center, {problem.nodes, problem.channels});
  Tensor mean = new_empty(slope, {wanted}), var = new_empty(slope, {wanted});
  if (output.numel() == 0) return {output, zero_(mean), zero_(var)};
  dispatch(center.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    PAPER_LAYERS_DISPATCH(edge_conv(
        problem, center.const_data_ptr<T>(), neighbor.const_data_ptr<T>(), index.const_data_ptr<int64_t>(),
        *slope.const_data_ptr<A>(), smallest ? smallest->const_data_ptr<bool>() : nullptr,
        output.mutable_data_ptr<T>(), statistics ? mean.mutable_data_ptr<A>() : nullptr, var.mutable_data_ptr<A>()));
  });
  return {output, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> edge_conv_backward(Tensor grad, Tensor grad_mean, Tensor grad_var, Tensor center,
                                                      Tensor neighbor, Tensor index, const Tensor& slope,
                                                      Tensor output, Tensor mean) {
  const EdgeConvProblem problem =
      edge_conv_backward_problem(grad, grad_mean, grad_var, center, neighbor, index, slope, output, mean);
  const bool statistics = mean.numel() > 0;
  check_index(index.const_data_ptr<int64_t>(), index.numel(), problem.rows);
  Tensor grad_center = empty_like(center), grad_slope = new_empty(slope, {});
  Tensor grad_neighbor = new_empty(slope, {problem.rows, problem.channels});
  if (center.numel() == 0) {
    return {grad_center, to_dtype(zero_(grad_neighbor), center.scalar_type()), zero_(grad_slope)};
  }
  dispatch(center.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    PAPER_LAYERS_DISPATCH(edge_conv_backward(
        problem, grad.const_data_ptr<T>(), grad_mean.const_data_ptr<A>(), grad_var.const_data_ptr<A>(),
        center.const_data_ptr<T>(), neighbor.const_data_ptr<T>(), index.const_data_ptr<int64_t>(),
        *slope.const_data_ptr<A>(), output.const_data_ptr<T>(), statistics ? mean.const_data_ptr<A>() : nullptr,
        grad_center.mutable_data_ptr<T>(), grad_neighbor.mutable_data_ptr<A>(), grad_slope.mutable_data_ptr<A>()));
  });
  return {grad_center, to_dtype(grad_neighbor, center.scalar_type()), grad_slope};
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("edge_conv", TORCH_BOX(&paper_layers::edge_conv));
  m.impl("edge_conv_backward", TORCH_BOX(&paper_layers::edge_conv_backward));
}
