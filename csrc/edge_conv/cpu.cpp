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

Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

std::tuple<Tensor, Tensor, Tensor> edge_conv(const Tensor& any_center, const Tensor& any_neighbor,
                                             const Tensor& any_index, const Tensor& slope,
                                             std::optional<Tensor> smallest, bool statistics) {
  const EdgeConvProblem problem = edge_conv_problem(any_center, any_neighbor, any_index, slope, smallest);
  const Tensor center = dense(any_center), neighbor = dense(any_neighbor), index = dense(any_index);
  const Tensor signs = smallest ? dense(*smallest) : index;
  check_index(index.const_data_ptr<int64_t>(), index.numel(), problem.rows);
  const std::vector<int64_t> shape = {problem.nodes, problem.channels}, wanted = {statistics ? problem.channels : 0};
  Tensor output = torch::stable::new_empty(center, shape);
  Tensor mean = torch::stable::new_empty(slope, wanted), var = torch::stable::new_empty(slope, wanted);
  if (output.numel() == 0) return {output, torch::stable::zero_(mean), torch::stable::zero_(var)};
  THO_DISPATCH_V2(center.scalar_type(), "edge_conv", AT_WRAP([&] {
                    using A = Accumulator<scalar_t>;
                    PAPER_LAYERS_DISPATCH(edge_conv(
                        problem, center.const_data_ptr<scalar_t>(), neighbor.const_data_ptr<scalar_t>(),
                        index.const_data_ptr<int64_t>(), *slope.const_data_ptr<A>(),
                        smallest ? signs.const_data_ptr<bool>() : nullptr, output.mutable_data_ptr<scalar_t>(),
                        statistics ? mean.mutable_data_ptr<A>() : nullptr, var.mutable_data_ptr<A>()));
                  }),
                  ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half);
  return {output, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> edge_conv_backward(const Tensor& any_grad, const Tensor& any_grad_mean,
                                                      const Tensor& any_grad_var, const Tensor& any_center,
                                                      const Tensor& any_neighbor, const Tensor& any_index,
                                                      const Tensor& slope, const Tensor& any_output,
                                                      const Tensor& any_mean) {
  const EdgeConvProblem problem = edge_conv_backward_problem(any_grad, any_grad_mean, any_grad_var, any_center,
                                                             any_neighbor, any_index, slope, any_output, any_mean);
  const bool statistics = any_mean.numel() > 0;
  const Tensor grad = dense(any_grad), grad_mean = dense(any_grad_mean), grad_var = dense(any_grad_var);
  const Tensor center = dense(any_center), neighbor = dense(any_neighbor), index = dense(any_index);
  const Tensor output = dense(any_output), mean = dense(any_mean);
  check_index(index.const_data_ptr<int64_t>(), index.numel(), problem.rows);
  const std::vector<int64_t> one = {}, shape = {problem.rows, problem.channels};
  Tensor grad_center = torch::stable::empty_like(center), grad_slope = torch::stable::new_empty(slope, one);
  Tensor grad_neighbor = torch::stable::new_empty(slope, shape);
  if (center.numel() == 0) {
    torch::stable::zero_(grad_neighbor);
    return {grad_center, torch::stable::to(grad_neighbor, center.scalar_type()), torch::stable::zero_(grad_slope)};
  }
  THO_DISPATCH_V2(center.scalar_type(), "edge_conv_backward", AT_WRAP([&] {
                    using A = Accumulator<scalar_t>;
                    PAPER_LAYERS_DISPATCH(edge_conv_backward(
                        problem, grad.const_data_ptr<scalar_t>(), grad_mean.const_data_ptr<A>(),
                        grad_var.const_data_ptr<A>(), center.const_data_ptr<scalar_t>(),
                        neighbor.const_data_ptr<scalar_t>(), index.const_data_ptr<int64_t>(),
                        *slope.const_data_ptr<A>(), output.const_data_ptr<scalar_t>(),
                        statistics ? mean.const_data_ptr<A>() : nullptr, grad_center.mutable_data_ptr<scalar_t>(),
                        grad_neighbor.mutable_data_ptr<A>(), grad_slope.mutable_data_ptr<A>()));
                  }),
                  ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half);
  return {grad_center, torch::stable::to(grad_neighbor, center.scalar_type()), grad_slope};
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("edge_conv", TORCH_BOX(&paper_layers::edge_conv));
  m.impl("edge_conv_backward", TORCH_BOX(&paper_layers::edge_conv_backward));
}
