// Local importance-based pooling on the CPU.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>

#include "lip_pool2d/problem.h"

#define PAPER_LAYERS_KERNEL "lip_pool2d/cpu_kernel.isa.h"
#include "common/for_each_isa.h"

namespace paper_layers {
namespace {

// The problem as the kernels take it: pixels of fewer channels than a vector holds go through NCHW, where a copy of the
// image costs less than parts of vectors.
LipPool2dProblem in_kernels_layout(LipPool2dProblem problem) {
  problem.channels_last &= problem.channels >= kVectorElements || is_packed(problem);
  return problem;
}

Tensor lip_pool2d(const Tensor& input, const Tensor& logit, std::vector<int64_t> kernel_size,
                  std::vector<int64_t> stride, std::vector<int64_t> padding, bool ceil_mode) {
  const auto given = lip_pool2d_problem(input, logit, kernel_size, stride, padding, ceil_mode);
  const auto problem = in_kernels_layout(given);
  const auto format = memory_format(problem);
  Tensor output = new_empty(input, output_sizes(problem), input.scalar_type(), problem);
  if (output.numel() == 0) return output;
  const Tensor x = to_contiguous(input, format), l = to_contiguous(logit, format);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    PAPER_LAYERS_DISPATCH(
        forward(problem, x.const_data_ptr<T>(), l.const_data_ptr<T>(), output.mutable_data_ptr<T>()));
  });
  return to_contiguous(output, memory_format(given));
}

std::tuple<Tensor, Tensor> lip_pool2d_backward(const Tensor& grad, const Tensor& input, const Tensor& logit,
                                               const Tensor& output, std::vector<int64_t> kernel_size,
                                               std::vector<int64_t> stride, std::vector<int64_t> padding,
                                               bool ceil_mode) {
  const auto given = lip_pool2d_problem(input, logit, kernel_size, stride, padding, ceil_mode);
  const auto problem = in_kernels_layout(given);
  check_like_output("grad", grad, input, problem);
  check_like_output("output", output, input, problem);
  const auto format = memory_format(problem);
  const Sizes sizes = {problem.images, problem.channels, problem.height.length, problem.width.length};
  const Sizes logit_sizes = {sizes[0], logit.size(1), sizes[2], sizes[3]};
  Tensor grad_input = new_empty(input, sizes, input.scalar_type(), problem);
  Tensor grad_logit = new_empty(input, logit_sizes, input.scalar_type(), problem);
  if (grad_input.numel() == 0) {
    zero_(grad_logit);  // shared logits of no channels
    return {grad_input, grad_logit};
  }
  const Tensor g = to_contiguous(grad, format), x = to_contiguous(input, format),
               l = to_contiguous(logit, format), y = to_contiguous(output, format);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    PAPER_LAYERS_DISPATCH(backward(problem, g.const_data_ptr<T>(), x.const_data_ptr<T>(), l.const_data_ptr<T>(),
                                   y.const_data_ptr<T>(), grad_input.mutable_data_ptr<T>(),
                                   grad_logit.mutable_data_ptr<T>()));
  });
  return {to_contiguous(grad_input, memory_format(given)), to_contiguous(grad_logit, memory_format(given))};
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("lip_pool2d", TORCH_BOX(&paper_layers::lip_pool2d));
  m.impl("lip_pool2d_backward", TORCH_BOX(&paper_layers::lip_pool2d_backward));
}
