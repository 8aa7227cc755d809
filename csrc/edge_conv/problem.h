// The argument checks of edge_conv and the problem that follows from them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "common/neighbor_table.h"
#include "common/tensors.h"

namespace paper_layers {

struct EdgeConvProblem {
  int64_t nodes, rows, k, channels;
};

// The number of edges of a table, at least 1.
inline double count_edges(const EdgeConvProblem& problem, const int64_t* index) {
  const int64_t* end = index + problem.nodes * problem.k;
  return std::max<int64_t>(1, std::count_if(index, end, [](int64_t row) { return row >= 0; }));
}

inline void check_vector(const char* name, const Tensor& tensor, int64_t length, ScalarType dtype,
                         const Tensor& center) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == length && tensor.scalar_type() == dtype, name, ": expected ",
                  length, " elements of ", dtype, ", got ", tensor.scalar_type(), " of shape ",
                  to_string(tensor.sizes()));
  check_same_device(name, tensor, "center", center);
}

inline EdgeConvProblem check_edge_conv(const Tensor& center, const Tensor& neighbor, const Tensor& index,
                                       const Tensor& slope, const MaybeTensor& smallest) {
  check_floating("center", center);
  STD_TORCH_CHECK(center.dim() == 2, "center: expected shape (M, C), got ", to_string(center.sizes()));
  STD_TORCH_CHECK(neighbor.dim() == 2 && neighbor.size(1) == center.size(1), "neighbor: expected shape (N, ",
                  center.size(1), "), got ", to_string(neighbor.sizes()));
  check_same_dtype_and_device("neighbor", neighbor, "center", center);
  check_table(index);
  check_same_device("index", index, "center", center);
  STD_TORCH_CHECK(index.size(0) == center.size(0), "index: expected the rows of center, ", center.size(0), ", got ",
                  index.size(0));
  STD_TORCH_CHECK(slope.numel() == 1 && slope.scalar_type() == accumulation_dtype(center.scalar_type()),
                  "slope: expected one element of ", accumulation_dtype(center.scalar_type()), ", got ",
                  slope.scalar_type(), " of shape ", to_string(slope.sizes()));
  check_same_device("slope", slope, "center", center);
  if (smallest) check_vector("smallest", *smallest, center.size(1), ScalarType::Bool, center);
  return {center.size(0), neighbor.size(0), index.size(1), center.size(1)};
}

// Checks the arguments of edge_conv and makes them contiguous.
inline EdgeConvProblem edge_conv_problem(Tensor& center, Tensor& neighbor, Tensor& index, const Tensor& slope,
                                         MaybeTensor& smallest) {
  const EdgeConvProblem problem = check_edge_conv(center, neighbor, index, slope, smallest);
  make_contiguous(center, neighbor, index);
  make_contiguous(smallest);
  return problem;
}

// The same for the arguments of its backward.
inline EdgeConvProblem edge_conv_backward_problem(Tensor& grad, Tensor& grad_mean, Tensor& grad_var, Tensor& center,
                                                  Tensor& neighbor, Tensor& index, const Tensor& slope, Tensor& output,
                                                  Tensor& mean) {
  const EdgeConvProblem problem = check_edge_conv(center, neighbor, index, slope, std::nullopt);
  for (const auto& [name, tensor] : {std::pair("grad", grad), std::pair("output", output)}) {
    check_shape(name, tensor, center.sizes());
    check_same_dtype_and_device(name, tensor, "center", center);
  }
  for (const auto& [name, tensor] :
       {std::pair("grad_mean", grad_mean), std::pair("grad_var", grad_var), std::pair("mean", mean)}) {
    check_vector(name, tensor, mean.numel() > 0 ? problem.channels : 0, slope.scalar_type(), center);
  }
  make_contiguous(grad, grad_mean, grad_var, center, neighbor, index, output, mean);
  return problem;
}

}  // namespace paper_layers
