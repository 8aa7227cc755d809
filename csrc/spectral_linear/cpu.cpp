// A linear layer over its weight's spectral norm on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/Dispatch_v2.h>

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

template <typename Function>
void with_dtype(ScalarType dtype, Function function) {
  THO_DISPATCH_V2(dtype, "spectral_linear", AT_WRAP([&] { function(scalar_t{}); }), ScalarType::Float,
                  ScalarType::Double, ScalarType::BFloat16, ScalarType::Half);
}

Tensor empty(const Tensor& like, std::vector<int64_t> shape) { return torch::stable::new_empty(like, shape); }
Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }
Tensor wide(const Tensor& tensor, const Tensor& weight) {
  return dense(torch::stable::to(tensor, accumulation_dtype(weight.scalar_type())));
}

// As the products' library takes it: copied once where every share would copy it.
Tensor with_lines(const Tensor& matrix) {
  return matrix.stride(0) == 1 || matrix.stride(1) == 1 ? matrix : dense(matrix);
}

// to = a b / sigma, plus a row if there is any.
void multiply(const Tensor& to, const std::optional<Tensor>& row, const Tensor& a, const Tensor& b, double sigma) {
  const bool half = accumulation_dtype(to.scalar_type()) != to.scalar_type();
  // Torch has instructions of their own for half types.
  if (half) add_product(row ? *row : to, a, b, row.has_value(), 1 / sigma, to);
  else multiply_in_shares(to, row, a, b, 1 / sigma);
}

double value_of(const Tensor& sigma, const Tensor& weight) {
  check_beside("sigma", sigma, {}, weight);
  double value = 0;
  with_dtype(sigma.scalar_type(), [&](auto element) { value = *sigma.const_data_ptr<decltype(element)>(); });
  return value;
}

std::tuple<Tensor, Tensor, Tensor> power_iteration(const Tensor& any_weight, const Tensor& any_v) {
  const Matrix problem = matrix("weight", any_weight);
  check_like("v", any_v, {problem.columns}, any_weight);
  const Tensor weight = dense(any_weight), v = dense(any_v);
  Tensor left = empty(weight, {problem.rows}), right = empty(weight, {problem.columns});
  const std::vector<int64_t> scalar;
  Tensor sigma = torch::stable::new_empty(weight, scalar, accumulation_dtype(weight.scalar_type()));
  with_dtype(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    PAPER_LAYERS_DISPATCH(power_iteration(problem, weight.const_data_ptr<T>(), v.const_data_ptr<T>(),
                                          left.mutable_data_ptr<T>(), right.mutable_data_ptr<T>(),
                                          sigma.mutable_data_ptr<Accumulator<T>>()));
  });
  return {left, right, sigma};
}

Tensor spectral_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Tensor& sigma) {
  const Matrix problem = matrix("weight", weight);
  const int64_t rows = matrix("input", input).rows;
  check_like("input", input, {rows, problem.columns}, weight);
  if (bias) check_like("bias", *bias, {problem.rows}, weight);
  const Tensor output = empty(weight, {rows, problem.rows});
  const auto row = bias ? std::optional<Tensor>(dense(*bias)) : std::nullopt;
  multiply(output, row, with_lines(input), torch::stable::transpose(with_lines(weight), 0, 1), value_of(sigma, weight));
  return output;
}

std::tuple<Tensor, Tensor, Tensor> spectral_linear_backward(const Tensor& any_grad, const Tensor& any_input,
                                                            const Tensor& any_weight, const Tensor& any_left,
                                                            const Tensor& any_right, const Tensor& any_sigma,
                                                            bool needs_input, bool needs_weight, bool needs_bias) {
  const Matrix problem = matrix("weight", any_weight);
  const int64_t rows = matrix("input", any_input).rows;
  check_like("input", any_input, {rows, problem.columns}, any_weight);
  check_like("grad", any_grad, {rows, problem.rows}, any_weight);
  check_beside("left", any_left, {problem.rows}, any_weight);
  check_beside("right", any_right, {problem.columns}, any_weight);
  const double sigma = value_of(any_sigma, any_weight);
  const Tensor grad = dense(any_grad), input = dense(any_input), weight = dense(any_weight);
  const Tensor left = wide(any_left, weight), right = wide(any_right, weight);

  const auto empty_if = [&](bool needed, std::vector<int64_t> shape) {
    return empty(weight, needed ? shape : std::vector<int64_t>{0});
  };
  const Tensor grad_input = empty_if(needs_input, {rows, problem.columns}),
               grad_weight = empty_if(needs_weight, {problem.rows, problem.columns}),
               grad_bias = empty_if(needs_bias, {problem.rows});
  if (needs_input) multiply(grad_input, std::nullopt, grad, weight, sigma);
  if (needs_weight) multiply(grad_weight, std::nullopt, torch::stable::transpose(grad, 0, 1), input, sigma);
  if (weight.numel() == 0) return {grad_input, grad_weight, grad_bias};
  with_dtype(weight.scalar_type(), [&](auto element) {
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
