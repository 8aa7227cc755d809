// The six ops, for the CPU and for CUDA. Include this after the functions that they call: run_forward, run_backward,
// in_kernels_layout, new_output and in_given_layout, which cpu.cpp and cuda.cu define.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "split_batch_norm/problem.h"

namespace paper_layers {
namespace {

using Sizes = std::vector<int64_t>;

std::tuple<Tensor, Tensor, Tensor> split_batch_norm(const Tensor& input, const MaybeTensor& weight,
                                                    const MaybeTensor& bias, Sizes split_sizes, double eps) {
  const auto given = split_batch_norm_problem(input, split_sizes), problem = in_kernels_layout(given);
  const Tensor mean = new_values(input, problem), var = new_values(input, problem);
  const Tensor output = new_output(input, given, problem);
  run_forward(input, problem, weight, bias, mean, var, output, false, eps);
  return {in_given_layout(output, input, given), mean, var};
}

std::tuple<Tensor, Tensor> split_batch_norm_statistics(const Tensor& input, Sizes split_sizes) {
  const auto problem = in_kernels_layout(split_batch_norm_problem(input, split_sizes));
  const Tensor mean = new_values(input, problem), var = new_values(input, problem);
  run_forward(input, problem, std::nullopt, std::nullopt, mean, var, std::nullopt, false, 0);
  return {mean, var};
}

Tensor split_batch_norm_normalize(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias,
                                  const Tensor& mean, const Tensor& var, Sizes split_sizes, double eps) {
  const auto given = split_batch_norm_problem(input, split_sizes), problem = in_kernels_layout(given);
  check_values("mean", mean, input, problem);
  check_values("var", var, input, problem);
  const Tensor output = new_output(input, given, problem);
  run_forward(input, problem, weight, bias, to_contiguous(mean), to_contiguous(var), output,
              true, eps);
  return in_given_layout(output, input, given);
}

std::tuple<Tensor, Tensor, Tensor> split_batch_norm_backward(const Tensor& grad, const Tensor& input,
                                                             const MaybeTensor& weight, const Tensor& mean,
                                                             const Tensor& var, Sizes split_sizes, double eps) {
  const auto given = split_batch_norm_problem(input, split_sizes), problem = in_kernels_layout(given);
  const Tensor products = new_values(input, problem), sums = new_values(input, problem);
  const Tensor grad_input = new_output(input, given, problem);
  run_backward(grad, input, problem, weight, mean, var, products, sums, grad_input, false, eps);
  return {in_given_layout(grad_input, input, given), products, sums};
}

std::tuple<Tensor, Tensor> split_batch_norm_backward_sums(const Tensor& grad, const Tensor& input, const Tensor& mean,
                                                          const Tensor& var, Sizes split_sizes, double eps) {
  const auto problem = in_kernels_layout(split_batch_norm_problem(input, split_sizes));
  const Tensor products = new_values(input, problem), sums = new_values(input, problem);
  run_backward(grad, input, problem, std::nullopt, mean, var, products, sums, std::nullopt, false, eps);
  return {products, sums};
}

Tensor split_batch_norm_backward_input(const Tensor& grad, const Tensor& input, const MaybeTensor& weight,
                                       const Tensor& mean, const Tensor& var, const Tensor& mean_product,
                                       const Tensor& mean_grad, Sizes split_sizes, double eps) {
  const auto given = split_batch_norm_problem(input, split_sizes), problem = in_kernels_layout(given);
  check_values("mean_product", mean_product, input, problem);
  check_values("mean_grad", mean_grad, input, problem);
  const Tensor grad_input = new_output(input, given, problem);
  run_backward(grad, input, problem, weight, mean, var, to_contiguous(mean_product),
               to_contiguous(mean_grad), grad_input, true, eps);
  return in_given_layout(grad_input, input, given);
}

template <typename Library>
void register_ops(Library& m) {
  m.impl("split_batch_norm", TORCH_BOX(&split_batch_norm));
  m.impl("split_batch_norm_backward", TORCH_BOX(&split_batch_norm_backward));
  m.impl("split_batch_norm_statistics", TORCH_BOX(&split_batch_norm_statistics));
  m.impl("split_batch_norm_normalize", TORCH_BOX(&split_batch_norm_normalize));
  m.impl("split_batch_norm_backward_sums", TORCH_BOX(&split_batch_norm_backward_sums));
  m.impl("split_batch_norm_backward_input", TORCH_BOX(&split_batch_norm_backward_input));
}

}  // namespace
}  // namespace paper_layers
