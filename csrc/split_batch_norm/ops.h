// The seven ops, for the CPU and for CUDA. Include this after the functions that they call: move_running_statistics, and
// run_forward and run_backward, which cpu.cpp and cuda.cu define.
#pragma once

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "split_batch_norm/problem.h"

namespace paper_layers {
namespace {

using Sizes = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

std::tuple<Tensor, Tensor, Tensor> split_batch_norm(const Tensor& input, Tensors weight, Tensors bias,
                                                    Sizes split_sizes, double eps) {
  const auto problem = split_batch_norm_problem(input, split_sizes);
  const Tensor mean = new_values(input, problem), var = new_values(input, problem);
  const Tensor output = new_like(input);
  run_forward(input, problem, std::move(weight), std::move(bias), mean, var, output, false, eps);
  return {output, mean, var};
}

// The same, and running statistics move.
std::tuple<Tensor, Tensor, Tensor> split_batch_norm_training(const Tensor& input, Tensors weight, Tensors bias,
                                                             Tensors running_mean, Tensors running_var,
                                                             Tensors batches, Sizes split_sizes, double eps,
                                                             std::optional<double> momentum) {
  const auto problem = split_batch_norm_problem(input, split_sizes);
  for (const Tensors* running : {&running_mean, &running_var, &batches}) {
    for (const Tensor& tensor : *running) check_same_device("running_mean, running_var, batches", tensor, "input", input);
  }
  Sizes counts;
  for (int64_t split = 0; split < problem.splits(); ++split) counts.push_back(problem.count(split));
  auto results = split_batch_norm(input, std::move(weight), std::move(bias), std::move(split_sizes), eps);
  move_running_statistics(std::move(running_mean), std::move(running_var), std::move(batches), std::get<1>(results),
                          std::get<2>(results), std::move(counts), std::nullopt, momentum);
  return results;
}

std::tuple<Tensor, Tensor> split_batch_norm_statistics(const Tensor& input, Sizes split_sizes) {
  const auto problem = split_batch_norm_problem(input, split_sizes);
  const Tensor mean = new_values(input, problem), var = new_values(input, problem);
  run_forward(input, problem, {}, {}, mean, var, std::nullopt, false, 0);
  return {mean, var};
}

Tensor split_batch_norm_normalize(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias,
                                  const Tensor& mean, const Tensor& var, Sizes split_sizes, double eps) {
  const auto problem = split_batch_norm_problem(input, split_sizes);
  check_values("mean", mean, input, problem);
  check_values("var", var, input, problem);
  const Tensor output = new_like(input);
  run_forward(input, problem, listed(weight), listed(bias), to_contiguous(mean), to_contiguous(var), output, true, eps);
  return output;
}

// The gradients of the weights and of `biases` biases have the weights' shape and dtype. Without weights one bias is a
// tensor (S, C), and as many as there are splits are tensors (C,).
std::tuple<Tensor, Tensors, Tensors> split_batch_norm_backward(const Tensor& grad, const Tensor& input, Tensors weight,
                                                               const Tensor& mean, const Tensor& var, int64_t biases,
                                                               Sizes split_sizes, double eps) {
  const auto problem = split_batch_norm_problem(input, split_sizes);
  const Parameters weights("weight", std::move(weight), input, problem);
  const int64_t count = weights.tensors.size();
  STD_TORCH_CHECK(biases == 0 || biases == (count > 0 ? count : 1) || (count == 0 && biases == problem.splits()),
                  "biases: expected 0 or the number of weights, ", count, ", got ", biases);
  const bool is_table = count > 0 ? weights.tensors[0].dim() == 2 : biases != problem.splits();
  const Gradients products(count, is_table, weights.dtype, input, problem);
  const Gradients sums(biases, is_table, weights.dtype, input, problem);
  const Tensor grad_input = new_like(input);
  run_backward(grad, input, problem, weights, mean, var, products, sums, nullptr, grad_input, eps);
  return {grad_input, products.tensors, sums.tensors};
}

std::tuple<Tensor, Tensor> split_batch_norm_backward_sums(const Tensor& grad, const Tensor& input, const Tensor& mean,
                                                          const Tensor& var, Sizes split_sizes, double eps) {
  const auto problem = split_batch_norm_problem(input, split_sizes);
  const Tensor products = new_values(input, problem), sums = new_values(input, problem);
  run_backward(grad, input, problem, Parameters("weight", {}, input, problem), mean, var, Gradients(products),
               Gradients(sums), nullptr, std::nullopt, eps);
  return {products, sums};
}

Tensor split_batch_norm_backward_input(const Tensor& grad, const Tensor& input, const MaybeTensor& weight,
                                       const Tensor& mean, const Tensor& var, const Tensor& mean_product,
                                       const Tensor& mean_grad, Sizes split_sizes, double eps) {
  const auto problem = split_batch_norm_problem(input, split_sizes);
  check_values("mean_product", mean_product, input, problem);
  check_values("mean_grad", mean_grad, input, problem);
  const Tensor grad_input = new_like(input);
  const Gradients none(0, false, mean.scalar_type(), input, problem);
  const std::array<Tensor, 2> means = {to_contiguous(mean_product), to_contiguous(mean_grad)};
  run_backward(grad, input, problem, Parameters("weight", listed(weight), input, problem), mean, var, none, none,
               means.data(), grad_input, eps);
  return grad_input;
}

template <typename Library>
void register_ops(Library& m) {
  m.impl("split_batch_norm", TORCH_BOX(&split_batch_norm));
  m.impl("split_batch_norm_training_", TORCH_BOX(&split_batch_norm_training));
  m.impl("split_batch_norm_backward", TORCH_BOX(&split_batch_norm_backward));
  m.impl("split_batch_norm_statistics", TORCH_BOX(&split_batch_norm_statistics));
  m.impl("split_batch_norm_normalize", TORCH_BOX(&split_batch_norm_normalize));
  m.impl("split_batch_norm_backward_sums", TORCH_BOX(&split_batch_norm_backward_sums));
  m.impl("split_batch_norm_backward_input", TORCH_BOX(&split_batch_norm_backward_input));
}

}  // namespace
}  // namespace paper_layers
