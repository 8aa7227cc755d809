// Reductions over neighbours' rows on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "neighbor_reduce/problem.h"

#define PAPER_LAYERS_KERNEL "neighbor_reduce/cpu_kernel.isa.h"
#include "common/for_each_isa.h"

namespace paper_layers {
namespace {

std::tuple<Tensor, Tensor> neighbor_reduce(Tensor input, Tensor index, std::string reduce, bool relative) {
  const NeighborReduceProblem problem = neighbor_reduce_problem("input", input, index, input.dim() > 1 ? input.size(-2) : 0, reduce, relative);
  make_contiguous(input, index);
  check_index(index.const_data_ptr<int64_t>(), index.numel(), problem.cloud_rows);
  Tensor output = new_empty(input, with_row_count(input, problem.cloud_nodes)), arg = new_arg(input, problem);
  if (output.numel() == 0) return {output, arg};
  dispatch(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    PAPER_LAYERS_DISPATCH(neighbor_reduce(problem, input.const_data_ptr<T>(), index.const_data_ptr<int64_t>(),
                                          output.mutable_data_ptr<T>(), arg.mutable_data_ptr<int32_t>()));
  });
  return {output, arg};
}

Tensor neighbor_reduce_backward(const Tensor& grad, Tensor index, Tensor arg, int64_t rows, std::string reduce,
                                bool relative) {
  const NeighborReduceProblem problem = neighbor_reduce_backward_problem(grad, index, arg, rows, reduce, relative);
  const ScalarType dtype = accumulation_dtype(grad.scalar_type());
  const Tensor g = to_contiguous(to_dtype(grad, dtype));
  make_contiguous(index, arg);
  check_index(index.const_data_ptr<int64_t>(), index.numel(), rows);
  Tensor grad_input = new_empty(g, with_row_count(g, rows));
  if (grad_input.numel() == 0 || g.numel() == 0) return to_dtype(zero_(grad_input), grad.scalar_type());
  dispatch_accumulator(dtype, [&](auto element) {
    using A = decltype(element);
    PAPER_LAYERS_DISPATCH(neighbor_reduce_backward(problem, g.const_data_ptr<A>(), index.const_data_ptr<int64_t>(),
                                                   arg.const_data_ptr<int32_t>(), grad_input.mutable_data_ptr<A>()));
  });
  return to_dtype(grad_input, grad.scalar_type());
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("neighbor_reduce", TORCH_BOX(&paper_layers::neighbor_reduce));
  m.impl("neighbor_reduce_backward", TORCH_BOX(&paper_layers::neighbor_reduce_backward));
}
