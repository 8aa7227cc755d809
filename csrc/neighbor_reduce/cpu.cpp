// Reductions over neighbours' rows on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <tuple>

#include "common/accumulator.h"
#include "neighbor_reduce/problem.h"

#define PAPER_LAYERS_KERNEL "neighbor_reduce/cpu_kernel.isa.h"
#include "common/for_each_isa.h"

namespace paper_layers {
namespace {

std::tuple<Tensor, Tensor> neighbor_reduce(const Tensor& input, const Tensor& index, std::string reduce,
                                           bool relative) {
  const NeighborReduceProblem problem = neighbor_reduce_problem("input", input, index, reduce, relative);
  const Tensor x = torch::stable::contiguous(input), i = torch::stable::contiguous(index);
  check_index(i.const_data_ptr<int64_t>(), i.numel(), problem.rows);
  const std::vector<int64_t> shape = {problem.nodes, problem.channels}, none = {0};
  Tensor output = torch::stable::new_empty(x, shape);
  Tensor arg = torch::stable::new_empty(x, problem.has_arg() ? shape : none, ScalarType::Int);
  if (output.numel() == 0) return {output, arg};
  THO_DISPATCH_V2(x.scalar_type(), "neighbor_reduce", AT_WRAP([&] {
                    PAPER_LAYERS_DISPATCH(neighbor_reduce(problem, x.const_data_ptr<scalar_t>(),
                                                          i.const_data_ptr<int64_t>(),
                                                          output.mutable_data_ptr<scalar_t>(),
                                                          arg.mutable_data_ptr<int32_t>()));
                  }),
                  ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half);
  return {output, arg};
}

Tensor neighbor_reduce_backward(const Tensor& grad, const Tensor& index, const Tensor& arg, int64_t rows,
                                std::string reduce, bool relative) {
  const NeighborReduceProblem problem = neighbor_reduce_backward_problem(grad, index, arg, rows, reduce, relative);
  const ScalarType dtype = accumulation_dtype(grad.scalar_type());
  const Tensor g = torch::stable::contiguous(torch::stable::to(grad, dtype)), i = torch::stable::contiguous(index),
               a = torch::stable::contiguous(arg);
  check_index(i.const_data_ptr<int64_t>(), i.numel(), rows);
  const std::vector<int64_t> shape = {rows, problem.channels};
  Tensor grad_input = torch::stable::new_empty(g, shape);
  if (grad_input.numel() == 0 || g.numel() == 0) {
    return torch::stable::to(torch::stable::zero_(grad_input), grad.scalar_type());
  }
  THO_DISPATCH_V2(dtype, "neighbor_reduce_backward", AT_WRAP([&] {
                    PAPER_LAYERS_DISPATCH(neighbor_reduce_backward(
                        problem, g.const_data_ptr<scalar_t>(), i.const_data_ptr<int64_t>(), a.const_data_ptr<int32_t>(),
                        grad_input.mutable_data_ptr<scalar_t>()));
                  }),
                  ScalarType::Float, ScalarType::Double);
  return torch::stable::to(grad_input, grad.scalar_type());
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("neighbor_reduce", TORCH_BOX(&paper_layers::neighbor_reduce));
  m.impl("neighbor_reduce_backward", TORCH_BOX(&paper_layers::neighbor_reduce_backward));
}
