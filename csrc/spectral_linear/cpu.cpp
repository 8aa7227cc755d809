// A linear layer over its weight's spectral norm on the CPU.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>

#include "spectral_linear/problem.h"

#define PAPER_LAYERS_KERNEL "spectral_linear/cpu_kernel.h"
#include "common/for_each_isa.h"

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

// True where products are ours. Those of half types are torch's, which has instructions for them.
bool has_own_products(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double;
}

// Calls function with an element of a dtype whose products are ours.
template <typename Function>
void with_own_dtype(ScalarType dtype, Function function) {
  THO_DISPATCH_V2(dtype, "spectral_linear", AT_WRAP([&] { function(scalar_t{}); }), ScalarType::Float,
                  ScalarType::Double);
}

template <typename A>
const A* data_of(const Tensor& tensor) {
  return tensor.const_data_ptr<A>();
}

// Input times the transposed weight, over sigma, and a bias. Of input and weight, the one of fewer rows is transposed.
Tensor own_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, double sigma) {
  const int64_t B = input.size(0), M = weight.size(0), N = weight.size(1);
  const Tensor output = empty(weight, {B, M});
  const bool turns_weight = M < B;
  const Tensor turned = empty(weight, {N, turns_weight ? M : B});
  with_own_dtype(weight.scalar_type(), [&](auto element) {
    using A = decltype(element);
    const A *const x = data_of<A>(input), *const w = data_of<A>(weight);
    A *const columns = turned.mutable_data_ptr<A>(), *const y = output.mutable_data_ptr<A>();
    if (turns_weight) {
      PAPER_LAYERS_DISPATCH(transpose_matrix<A>(w, N, M, N, columns));
      PAPER_LAYERS_DISPATCH(multiply_in_shares<A>({x, N, 1}, columns, B, N, M, y));
    } else {
      const Tensor product = empty(weight, {M, B});
      PAPER_LAYERS_DISPATCH(transpose_matrix<A>(x, N, B, N, columns));
      PAPER_LAYERS_DISPATCH(
          multiply_in_shares<A>({w, N, 1}, columns, M, N, B, product.mutable_data_ptr<A>()));
      PAPER_LAYERS_DISPATCH(transpose_matrix<A>(data_of<A>(product), B, M, B, y));
    }
    PAPER_LAYERS_DISPATCH(
        scale_rows<A>({B, M}, static_cast<A>(1 / sigma), bias ? data_of<A>(*bias) : nullptr, y));
  });
  return output;
}

// The gradients of input (B, N), if it has elements, and weight (M, N), likewise, but for sigma's share.
void own_backward(const Tensor& grad, const Tensor& input, const Tensor& weight, double sigma, const Tensor& grad_input,
                  const Tensor& grad_weight) {
  const int64_t B = input.size(0), M = weight.size(0), N = weight.size(1);
  const Tensor scaled = empty(weight, {B, M});
  with_own_dtype(weight.scalar_type(), [&](auto element) {
    using A = decltype(element);
    A* const g = scaled.mutable_data_ptr<A>();
    PAPER_LAYERS_DISPATCH(scale_by<A>(static_cast<A>(1 / sigma), data_of<A>(grad), B * M, g));
    if (grad_input.numel() > 0) {
      PAPER_LAYERS_DISPATCH(
          multiply_in_shares<A>({g, M, 1}, data_of<A>(weight), B, M, N, grad_input.mutable_data_ptr<A>()));
    }
    if (grad_weight.numel() > 0) {
      PAPER_LAYERS_DISPATCH(
          multiply_in_shares<A>({g, 1, M}, data_of<A>(input), M, B, N, grad_weight.mutable_data_ptr<A>()));
    }
  });
}

// to = beta self + a b / sigma, where `self` goes with beta of 1 alone.
void multiply(const Tensor& to, const std::optional<Tensor>& self, const Tensor& a, const Tensor& b, double sigma) {
  const Tensor& added = self ? *self : to;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(to.get(), added.get(), a.get(), b.get(), self.has_value(), 1 / sigma));
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
  if (has_own_products(weight)) {
    const auto offset = bias ? std::optional<Tensor>(dense(*bias)) : std::nullopt;
    return own_forward(dense(input), dense(weight), offset, value_of(sigma, weight));
  }
  const Tensor output = empty(weight, {rows, problem.rows});
  multiply(output, bias, input, torch::stable::transpose(weight, 0, 1), value_of(sigma, weight));
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
  if (has_own_products(weight)) {
    own_backward(grad, input, weight, sigma, grad_input, grad_weight);
  } else {
    if (needs_input) multiply(grad_input, std::nullopt, grad, weight, sigma);
    if (needs_weight) multiply(grad_weight, std::nullopt, torch::stable::transpose(grad, 0, 1), input, sigma);
  }
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
