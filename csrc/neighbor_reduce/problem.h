// The argument checks of neighbor_reduce and the problem that follows from them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "common/neighbor_table.h"
#include "common/tensors.h"

namespace paper_layers {

enum class Reduce { max, min, sum, mean };

struct NeighborReduceProblem : CloudTable {
  int64_t channels;
  Reduce reduce;
  bool relative;  // differences to the node's own row, of which there are as many

  bool has_arg() const { return reduce == Reduce::max || reduce == Reduce::min; }
};

inline NeighborReduceProblem neighbor_reduce_problem(const char* name, const Tensor& features, const Tensor& index,
                                                     int64_t rows, const std::string& reduce, bool relative) {
  constexpr const char* names[] = {"max", "min", "sum", "mean"};
  const auto found = std::find(std::begin(names), std::end(names), reduce);
  STD_TORCH_CHECK(found != std::end(names), "reduce: expected max, min, sum or mean, got ", reduce);
  check_floating(name, features);
  check_rows(name, features, index);
  check_same_device("index", index, name, features);
  const CloudTable table = cloud_table(index, rows);
  STD_TORCH_CHECK(!relative || rows == table.cloud_nodes, "index: expected a row for each of ", name, ", ", rows,
                  ", with relative, got ", table.cloud_nodes);
  return {table, features.size(-1), static_cast<Reduce>(found - names), relative};
}

// The neighbour of each maximum or minimum; empty for sums and means.
inline Tensor new_arg(const Tensor& input, const NeighborReduceProblem& problem) {
  if (!problem.has_arg()) return new_empty(input, {0}, ScalarType::Int);
  return new_empty(input, with_row_count(input, problem.cloud_nodes), ScalarType::Int);
}

// The problem of the gradient of so many rows of each cloud.
inline NeighborReduceProblem neighbor_reduce_backward_problem(const Tensor& grad, const Tensor& index,
                                                              const Tensor& arg, int64_t rows,
                                                              const std::string& reduce, bool relative) {
  STD_TORCH_CHECK(rows >= 0, "rows: expected at least 0, got ", rows);
  const NeighborReduceProblem problem = neighbor_reduce_problem("grad", grad, index, rows, reduce, relative);
  STD_TORCH_CHECK(grad.size(-2) == problem.cloud_nodes, "grad: expected the rows of index, ", problem.cloud_nodes,
                  ", got ", grad.size(-2));
  STD_TORCH_CHECK(arg.scalar_type() == ScalarType::Int && (!problem.has_arg() || equal(arg.sizes(), grad.sizes())),
                  "arg: expected int32 of grad's shape, got ", arg.scalar_type(), " of shape ", to_string(arg.sizes()));
  check_same_device("arg", arg, "grad", grad);
  return problem;
}

}  // namespace paper_layers
