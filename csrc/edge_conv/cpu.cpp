// The edge pass of EdgeConv on the CPU, by itself and with the norm that follows it.
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

template <typename A>
A slope_value(const MaybeTensor& slope, double number) {
  return slope ? *slope->const_data_ptr<A>() : static_cast<A>(number);
}

std::tuple<Tensor, Tensor, Tensor> edge_conv(Tensor center, Tensor neighbor, Tensor index, MaybeTensor slope,
                                             MaybeTensor smallest, double number, bool statistics) {
  const EdgeConvProblem problem = edge_conv_problem(center, neighbor, index, slope);
  if (smallest) check_vector("smallest", *smallest, problem.channels, ScalarType::Bool, center);
  make_contiguous(smallest);
  check_index(index.const_data_ptr<int64_t>(), index.numel(), problem.cloud_rows);
  const ScalarType wide = accumulation_dtype(center.scalar_type());
  const int64_t wanted = statistics ? problem.channels : 0;
  Tensor output = new_empty(center, output_sizes(index, problem));
  Tensor mean = new_empty(center, {wanted}, wide), var = new_empty(center, {wanted}, wide);
  if (output.numel() == 0) return {output, zero_(mean), zero_(var)};
  dispatch(center.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    PAPER_LAYERS_DISPATCH(edge_conv(
        problem, center.const_data_ptr<T>(), neighbor.const_data_ptr<T>(), index.const_data_ptr<int64_t>(),
        slope_value<A>(slope, number), Kept<A>{data_or_null<bool>(smallest), nullptr, false},
        output.mutable_data_ptr<T>(), statistics ? mean.mutable_data_ptr<A>() : nullptr, var.mutable_data_ptr<A>()));
  });
  return {output, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> edge_conv_backward(Tensor grad, Tensor grad_mean, Tensor grad_var, Tensor center,
                                                      Tensor neighbor, Tensor index, MaybeTensor slope, Tensor output,
                                                      Tensor mean, double number) {
  const EdgeConvProblem problem = edge_conv_problem(center, neighbor, index, slope);
  check_outputs({{"grad", &grad}, {"output", &output}}, index, problem, center);
  check_statistics(grad_mean, grad_var, mean, problem, center);
  check_index(index.const_data_ptr<int64_t>(), index.numel(), problem.cloud_rows);
  const ScalarType wide = accumulation_dtype(center.scalar_type());
  Tensor grad_center = empty_like(center), grad_slope = new_empty(center, {}, wide);
  Tensor grad_neighbor = new_empty(center, neighbor.sizes(), wide);
  if (center.numel() == 0) {
    return {grad_center, to_dtype(zero_(grad_neighbor), center.scalar_type()), zero_(grad_slope)};
  }
  dispatch(center.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const EdgeGradients<A> gradients{mean.numel() > 0 ? mean.const_data_ptr<A>() : nullptr,
                                     grad_mean.const_data_ptr<A>(), grad_var.const_data_ptr<A>(), nullptr};
    PAPER_LAYERS_DISPATCH(edge_conv_backward(
        problem, grad.const_data_ptr<T>(), gradients, center.const_data_ptr<T>(), neighbor.const_data_ptr<T>(),
        index.const_data_ptr<int64_t>(), slope_value<A>(slope, number), output.const_data_ptr<T>(),
        grad_center.mutable_data_ptr<T>(), grad_neighbor.mutable_data_ptr<A>(), grad_slope.mutable_data_ptr<A>()));
  });
  return {grad_center, to_dtype(grad_neighbor, center.scalar_type()), grad_slope};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> edge_conv_norm(
    Tensor center, Tensor neighbor, Tensor index, MaybeTensor slope, MaybeTensor weight, MaybeTensor bias,
    MaybeTensor mean, MaybeTensor var, double number, double eps, bool opposite) {
  const EdgeConvProblem problem = edge_conv_problem(center, neighbor, index, slope);
  check_norm(weight, bias, mean, var, problem, center);
  check_index(index.const_data_ptr<int64_t>(), index.numel(), problem.cloud_rows);
  const ScalarType wide = accumulation_dtype(center.scalar_type());
  const int64_t wanted = mean ? 0 : problem.channels;
  Tensor output = new_empty(center, output_sizes(index, problem)), extreme = empty_like(output);
  Tensor new_mean = new_empty(center, {wanted}, wide), new_var = new_empty(center, {wanted}, wide);
  Tensor count = new_empty(index, {});
  *count.mutable_data_ptr<int64_t>() = count_edges(problem, index.const_data_ptr<int64_t>());
  if (output.numel() == 0) return {output, extreme, zero_(new_mean), zero_(new_var), count};
  dispatch(center.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t* table = index.const_data_ptr<int64_t>();
    A* const means = mean ? nullptr : new_mean.mutable_data_ptr<A>();
    PAPER_LAYERS_DISPATCH(edge_conv(problem, center.const_data_ptr<T>(), neighbor.const_data_ptr<T>(), table,
                                    slope_value<A>(slope, number),
                                    Kept<A>{nullptr, data_or_null<A>(weight), opposite},
                                    extreme.mutable_data_ptr<T>(), means, new_var.mutable_data_ptr<A>()));
    const EdgeNorm<A> norm{(mean ? *mean : new_mean).const_data_ptr<A>(), (mean ? *var : new_var).const_data_ptr<A>(),
                           data_or_null<A>(weight), data_or_null<A>(bias), static_cast<A>(eps)};
    PAPER_LAYERS_DISPATCH(
        normalize_edges(problem, table, norm, extreme.const_data_ptr<T>(), output.mutable_data_ptr<T>()));
  });
  return {output, extreme, new_mean, new_var, count};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> edge_conv_norm_backward(
    Tensor grad, Tensor center, Tensor neighbor, Tensor index, MaybeTensor slope, MaybeTensor weight, Tensor extreme,
    Tensor mean, Tensor var, double number, double eps, bool batch) {
  const EdgeConvProblem problem = edge_conv_problem(center, neighbor, index, slope);
  check_outputs({{"grad", &grad}, {"extreme", &extreme}}, index, problem, center);
  MaybeTensor means = mean, vars = var, none;
  check_norm(weight, none, means, vars, problem, center);
  check_index(index.const_data_ptr<int64_t>(), index.numel(), problem.cloud_rows);
  const ScalarType wide = accumulation_dtype(center.scalar_type());
  Tensor grad_center = empty_like(center), grad_slope = new_empty(center, {}, wide);
  Tensor grad_neighbor = new_empty(center, neighbor.sizes(), wide);
  Tensor grad_weight = new_empty(mean, {problem.channels}), grad_bias = new_empty(mean, {problem.channels});
  if (center.numel() == 0) {
    return {grad_center, to_dtype(zero_(grad_neighbor), center.scalar_type()), zero_(grad_slope), zero_(grad_weight),
            zero_(grad_bias)};
  }
  dispatch(center.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t* table = index.const_data_ptr<int64_t>();
    const EdgeNorm<A> norm{means->const_data_ptr<A>(), vars->const_data_ptr<A>(), data_or_null<A>(weight), nullptr,
                           static_cast<A>(eps)};
    std::vector<A> scratch(3 * problem.channels);
    const EdgeNormGradients<A> found{scratch.data(), scratch.data() + problem.channels,
                                     scratch.data() + 2 * problem.channels, grad_weight.mutable_data_ptr<A>(),
                                     grad_bias.mutable_data_ptr<A>()};
    PAPER_LAYERS_DISPATCH(normalize_edges_backward(problem, table, norm, grad.const_data_ptr<T>(),
                                                   extreme.const_data_ptr<T>(), found));
    const EdgeGradients<A> gradients{batch ? norm.mean : nullptr, found.mean, found.var, found.factor};
    PAPER_LAYERS_DISPATCH(edge_conv_backward(
        problem, grad.const_data_ptr<T>(), gradients, center.const_data_ptr<T>(), neighbor.const_data_ptr<T>(), table,
        slope_value<A>(slope, number), extreme.const_data_ptr<T>(), grad_center.mutable_data_ptr<T>(),
        grad_neighbor.mutable_data_ptr<A>(), grad_slope.mutable_data_ptr<A>()));
  });
  return {grad_center, to_dtype(grad_neighbor, center.scalar_type()), grad_slope, grad_weight, grad_bias};
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("edge_conv", TORCH_BOX(&paper_layers::edge_conv));
  m.impl("edge_conv_backward", TORCH_BOX(&paper_layers::edge_conv_backward));
  m.impl("edge_conv_norm", TORCH_BOX(&paper_layers::edge_conv_norm));
  m.impl("edge_conv_norm_backward", TORCH_BOX(&paper_layers::edge_conv_norm_backward));
}
