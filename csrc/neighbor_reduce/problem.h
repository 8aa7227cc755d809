// The argument checks of neighbor_reduce and the problem that follows from them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "common/neighbor_table.h"
#include "common/tensors.h"

namespace paper_layers {

enum class Reduce { max, min, sum, mean };

struct NeighborReduceProblem {
  int64_t rows, nodes, k, channels;
  Reduce reduce;
  bool relative;  // differences to the node's own row, of which there are as many

  bool has_arg() const { return reduce == Reduce::max || reduce == Reduce::min; }
};

inline NeighborReduceProblem neighbor_reduce_problem(const char* name, const Tensor& features, const Tensor& index,
                                                     const std::string& reduce, bool relative) {
  constexpr const char* names[] = {"max", "min", "sum", "mean"};
  const auto found = std::find(std::begin(names), std::end(names), reduce);
  STD_TORCH_CHECK(found != std::end(names), "reduce: expected max, min, sum or mean, got ", reduce);
  check_floating(name, features);
  STD_TORCH_CHECK(features.dim() == 2, name, ": expected two dimensions, got ", to_string(features.sizes()));
  check_table(index);
  check_same_device("index", index, name, features);
  STD_TORCH_CHECK(!relative || features.size(0) == index.size(0), "index: expected a row for each of ", name, ", ",
                  features.size(0), ", with relative, got ", index.size(0));
  return {features.size(0), index.size(0), index.size(1), features.size(1), static_cast<Reduce>(found - names),
          relative};
}

// The neighbour of each maximum or minimum; empty for sums and means.
inline Tensor new_arg(const Tensor& input, const NeighborReduceProblem& problem) {
  if (!problem.has_arg()) return new_empty(input, {0}, ScalarType::Int);
  return new_empty(input, {problem.nodes, problem.channels}, ScalarType::Int);
}

// The problem of the gradient of so many rows.
inline NeighborReduceProblem neighbor_reduce_backward_problem(const Tensor& grad, const Tensor& index,
                                                              const Tensor& arg, int64_t rows,
                                                              const std::string& reduce, bool relative) {
  NeighborReduceProblem problem = neighbor_reduce_problem("grad", grad, index, reduce, relative);
  STD_TORCH_CHECK(grad.size(0) == problem.nodes, "grad: expected the rows of index, ", problem.nodes, ", got ",
                  grad.size(0));
  STD_TORCH_CHECK(relative ? rows == problem.nodes : rows >= 0, "rows: expected ",
                  relative ? "those of grad" : "at least 0", ", got ", rows);
  STD_TORCH_CHECK(arg.scalar_type() == ScalarType::Int && (!problem.has_arg() || equal(arg.sizes(), grad.sizes())),
                  "arg: expected int32 of grad's shape, got ", arg.scalar_type(), " of shape ", to_string(arg.sizes()));
  check_same_device("arg", arg, "grad", grad);
  problem.rows = rows;
  return problem;
}

}  // namespace paper_layers
