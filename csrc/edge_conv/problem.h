// The argument checks of edge_conv and edge_conv_norm, and the problem that follows from them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "common/neighbor_table.h"
#include "common/tensors.h"

namespace paper_layers {

struct EdgeConvProblem : CloudTable {
  int64_t channels;
};

inline void check_vector(const char* name, const Tensor& tensor, int64_t length, ScalarType dtype,
                         const Tensor& center) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == length && tensor.scalar_type() == dtype, name, ": expected ",
                  length, " elements of ", dtype, ", got ", tensor.scalar_type(), " of shape ",
                  to_string(tensor.sizes()));
  check_same_device(name, tensor, "center", center);
}

inline void check_vectors(std::initializer_list<std::pair<const char*, const MaybeTensor&>> vectors, int64_t length,
                          ScalarType dtype, const Tensor& center) {
  for (const auto& [name, tensor] : vectors) {
    if (tensor) check_vector(name, *tensor, length, dtype, center);
  }
}

// Terms are (M, C) and (N, C) for a table (M, k), and (B, M, C) and (B, N, C), or all rows of these, for (B, M, k).
// Makes them contiguous.
inline EdgeConvProblem edge_conv_problem(Tensor& center, Tensor& neighbor, Tensor& index, const MaybeTensor& slope) {
  check_floating("center", center);
  STD_TORCH_CHECK(center.dim() == 2 || center.dim() == 3, "center: expected shape (M, C) or (B, M, C), got ",
                  to_string(center.sizes()));
  const int64_t channels = center.size(-1);
  STD_TORCH_CHECK(neighbor.dim() == center.dim() && neighbor.size(-1) == channels, "neighbor: expected ",
                  center.dim(), " dimensions, the last of size ", channels, ", got ", to_string(neighbor.sizes()));
  check_same_dtype_and_device("neighbor", neighbor, "center", center);
  int64_t rows = neighbor.size(-2);
  const bool flat = center.dim() == 2 && index.dim() == 3;
  if (flat) {
    const int64_t clouds = index.size(0), all = rows;
    rows = clouds > 0 ? all / clouds : 0;
    STD_TORCH_CHECK(clouds * rows == all, "neighbor: expected rows of ", clouds, " clouds of one size, got ", all);
  } else {
    check_rows("center", center, index);
    STD_TORCH_CHECK(center.dim() == 2 || neighbor.size(0) == center.size(0), "neighbor: expected the clouds of center, ",
                    center.size(0), ", got ", neighbor.size(0));
  }
  const CloudTable table = cloud_table(index, rows);
  check_same_device("index", index, "center", center);
  STD_TORCH_CHECK(center.size(-2) == (flat ? table.nodes : table.cloud_nodes), "index: expected the rows of center, ",
                  center.size(-2), ", got ", table.cloud_nodes);
  if (slope) {
    const ScalarType wide = accumulation_dtype(center.scalar_type());
    STD_TORCH_CHECK(slope->numel() == 1 && slope->scalar_type() == wide, "slope: expected one element of ", wide,
                    ", got ", slope->scalar_type(), " of shape ", to_string(slope->sizes()));
    check_same_device("slope", *slope, "center", center);
  }
  make_contiguous(center, neighbor, index);
  return {table, channels};
}

// Which edge of a node is kept: the largest of each channel, or the smallest, from where a batch norm's factor is
// negative.
template <typename A>
struct Kept {
  const bool* smallest;  // or null
  const A* weight;       // or null
  bool opposite;

  C10_HOST_DEVICE bool least(int64_t channel) const {
    if (smallest != nullptr) return smallest[channel];
    return (weight != nullptr && weight[channel] < A(0)) != opposite;
  }
};

// The norm of kept edges; weight and bias may be null.
template <typename A>
struct EdgeNorm {
  const A *mean, *var, *weight, *bias;
  A eps;

  C10_HOST_DEVICE double invstd(int64_t channel) const { return 1.0 / std::sqrt(double(var[channel]) + double(eps)); }
  C10_HOST_DEVICE A factor(int64_t channel) const {
    return static_cast<A>(invstd(channel) * (weight != nullptr ? double(weight[channel]) : 1.0));
  }
};

// Gradients of the norm's statistics and parameters, and its factor.
template <typename A>
struct EdgeNormGradients {
  A *mean, *var, *factor, *weight, *bias;

  // From the sum of the outputs' gradients, and of their products with deviations from the mean.
  C10_HOST_DEVICE void set(const EdgeNorm<A>& norm, int64_t channel, double total, double product) const {
    const double invstd = norm.invstd(channel), times = norm.factor(channel);
    factor[channel] = static_cast<A>(times);
    mean[channel] = static_cast<A>(-total * times);
    var[channel] = static_cast<A>(-0.5 * product * invstd * invstd * times);
    weight[channel] = static_cast<A>(product * invstd);
    bias[channel] = static_cast<A>(total);
  }
};

// The gradients of the statistics, and the factor of the output's gradient.
template <typename A>
struct EdgeGradients {
  const A* mean;  // or null: no statistics
  const A *grad_mean, *grad_var;
  const A* factor;  // or null
};

// The number of edges of a table.
inline int64_t count_edges(const EdgeConvProblem& problem, const int64_t* index) {
  return std::count_if(index, index + problem.nodes * problem.k, [](int64_t row) { return row >= 0; });
}

// The shape of the output: a row of channels for each row of the table.
inline std::vector<int64_t> output_sizes(const Tensor& index, const EdgeConvProblem& problem) {
  std::vector<int64_t> sizes(index.sizes().begin(), index.sizes().end());
  sizes.back() = problem.channels;
  return sizes;
}

// Checks tensors of the output's shape and makes them contiguous.
inline void check_outputs(std::initializer_list<std::pair<const char*, Tensor*>> tensors, const Tensor& index,
                          const EdgeConvProblem& problem, const Tensor& center) {
  const std::vector<int64_t> sizes = output_sizes(index, problem);
  for (const auto& [name, tensor] : tensors) {
    check_shape(name, *tensor, sizes);
    check_same_dtype_and_device(name, *tensor, "center", center);
    make_contiguous(*tensor);
  }
}

// The gradients of mean and variance, and the mean: of all channels, or of none.
inline void check_statistics(Tensor& grad_mean, Tensor& grad_var, Tensor& mean, const EdgeConvProblem& problem,
                             const Tensor& center) {
  for (const auto& [name, tensor] :
       {std::pair("grad_mean", &grad_mean), std::pair("grad_var", &grad_var), std::pair("mean", &mean)}) {
    check_vector(name, *tensor, mean.numel() > 0 ? problem.channels : 0, accumulation_dtype(center.scalar_type()),
                 center);
    make_contiguous(*tensor);
  }
}

// The parameters of the norm, and the statistics to normalise with: both, or neither to take those of the edges.
inline void check_norm(MaybeTensor& weight, MaybeTensor& bias, MaybeTensor& mean, MaybeTensor& var,
                       const EdgeConvProblem& problem, const Tensor& center) {
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "var: expected a Tensor if mean is one, and else None");
  check_vectors({{"weight", weight}, {"bias", bias}, {"mean", mean}, {"var", var}}, problem.channels,
                accumulation_dtype(center.scalar_type()), center);
  for (MaybeTensor* tensor : {&weight, &bias, &mean, &var}) make_contiguous(*tensor);
}

template <typename A>
const A* data_or_null(const MaybeTensor& tensor) {
  return tensor ? tensor->const_data_ptr<A>() : nullptr;
}

}  // namespace paper_layers
