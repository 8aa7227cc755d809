// A linear layer over its weight's spectral norm on the CPU.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>

#include "common/matrix_view.h"
#include "spectral_linear/problem.h"

#define PAPER_LAYERS_KERNEL "spectral_linear/cpu_kernel.isa.h"
#include "common/for_each_isa.h"
#include "common/products.h"

namespace paper_layers {
namespace {

Tensor wide(const Tensor& tensor, const Tensor& weight) {
  return to_contiguous(to_dtype(tensor, accumulation_dtype(weight.scalar_type())));
}

// The matrix with a stride of 1, as torch's products need it: copied once, not by every share.
Tensor with_lines(const Tensor& matrix) {
  return matrix.stride(0) == 1 || matrix.stride(1) == 1 ? matrix : to_contiguous(matrix);
}

// to = a b / sigma, plus a row if there is any.
void multiply(const Tensor& to, const MaybeTensor& row, const Tensor& a, const Tensor& b, double sigma) {
  const bool half = accumulation_dtype(to.scalar_type()) != to.scalar_type();
  // Torch has instructions of their own for half types.
  if (half) add_product(row ? *row : to, a, b, row.has_value(), 1 / sigma, to);
  else multiply_in_shares(to, row, a, b, 1 / sigma);
}

double value_of(const Tensor& sigma, const Tensor& weight) {
  check_beside("sigma", sigma, {}, weight);
  double value = 0;
  dispatch(sigma.scalar_type(), [&](auto element) { value = *sigma.const_data_ptr<decltype(element)>(); });
  return value;
}

std::tuple<Tensor, Tensor, Tensor> power_iteration(Tensor weight, Tensor v) {
  const Matrix problem = matrix("weight", weight);
  check_like("v", v, {problem.columns}, weight);
  make_contiguous(weight, v);
  Tensor left = new_empty(weight, {problem.rows}), right = new_empty(weight, {problem.columns});
  Tensor sigma = new_empty(weight, {}, accumulation_dtype(weight.scalar_type()));
  dispatch(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    PAPER_LAYERS_DISPATCH(power_iteration(problem, weight.const_data_ptr<T>(), v.const_data_ptr<T>(),
                                          left.mutable_data_ptr<T>(), right.mutable_data_ptr<T>(),
                                          sigma.mutable_data_ptr<Accumulator<T>>()));
  });
  return {left, right, sigma};
}

Tensor spectral_linear(const Tensor& input, const Tensor& weight, MaybeTensor bias, const Tensor& sigma) {
  const Matrix problem = matrix("weight", weight);
  const int64_t rows = matrix("input", input).rows;
  check_like("input", input, {rows, problem.columns}, weight);
  if (bias) check_like("bias", *bias, {problem.rows}, weight);
  make_contiguous(bias);
  const Tensor output = new_empty(weight, {rows, problem.rows});
  multiply(output, bias, with_lines(input), torch::stable::transpose(with_lines(weight), 0, 1), value_of(sigma, weight));
  return output;
}

std::tuple<Tensor, Tensor, Tensor> spectral_linear_backward(Tensor grad, Tensor input, Tensor weight,
                                                            const Tensor& any_left, const Tensor& any_right,
                                                            const Tensor& any_sigma, bool needs_input,
                                                            bool needs_weight, bool needs_bias) {
  const Matrix problem = matrix("weight", weight);
  const int64_t rows = matrix("input", input).rows;
  check_like("input", input, {rows, problem.columns}, weight);
  check_like("grad", grad, {rows, problem.rows}, weight);
  check_beside("left", any_left, {problem.rows}, weight);
  check_beside("right", any_right, {problem.columns}, weight);
  const double sigma = value_of(any_sigma, weight);
  make_contiguous(grad, input, weight);
  const Tensor left = wide(any_left, weight), right = wide(any_right, weight);

  const auto empty_if = [&](bool needed, IntHeaderOnlyArrayRef shape) {
    return needed ? new_empty(weight, shape) : new_empty(weight, {0});
  };
  const Tensor grad_input = empty_if(needs_input, {rows, problem.columns}),
               grad_weight = empty_if(needs_weight, {problem.rows, problem.columns}),
               grad_bias = empty_if(needs_bias, {problem.rows});
  if (needs_input) multiply(grad_input, std::nullopt, grad, weight, sigma);
  if (needs_weight) multiply(grad_weight, std::nullopt, torch::stable::transpose(grad, 0, 1), input, sigma);
  if (weight.numel() == 0) return {grad_input, grad_weight, grad_bias};
  dispatch(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    if (needs_weight) {
      // The slope of sigma, by the gradient that is there anyway.
      double along = 0;
      if (needs_input) {
        PAPER_LAYERS_DISPATCH(dot(Matrix{rows, problem.columns}, grad_input.const_data_ptr<T>(),
                                  input.const_data_ptr<T>(), &along));
      } else {
        PAPER_LAYERS_DISPATCH(dot(problem, grad_weight.const_data_ptr<T>(), weight.const_data_ptr<T>(), &along));
      }
      PAPER_LAYERS_DISPATCH(add_outer(problem, static_cast<A>(-along / sigma), left.const_data_ptr<A>(),
                                      right.const_data_ptr<A>(), grad_weight.mutable_data_ptr<T>()));
    }
    if (needs_bias) {
      PAPER_LAYERS_DISPATCH(
          sum_rows(Matrix{rows, problem.rows}, grad.const_data_ptr<T>(), grad_bias.mutable_data_ptr<T>()));
    }
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("power_iteration", TORCH_BOX(&paper_layers::power_iteration));
  m.impl("spectral_linear", TORCH_BOX(&paper_layers::spectral_linear));
  m.impl("spectral_linear_backward", TORCH_BOX(&paper_layers::spectral_linear_backward));
}
