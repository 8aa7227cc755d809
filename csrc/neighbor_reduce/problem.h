// The argument checks of neighbor_reduce and the problem that follows from them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "common/checks.h"
#include "common/table.h"

namespace paper_layers {

enum class Reduce { max, min, sum, mean };

struct NeighborReduceProblem {
  int64_t rows, nodes, k, channels;
  Reduce reduce;

  bool has_arg() const { return reduce == Reduce::max || reduce == Reduce::min; }
};

inline NeighborReduceProblem neighbor_reduce_problem(const char* name, const Tensor& features, const Tensor& index,
                                                     const std::string& reduce) {
  constexpr const char* names[] = {"max", "min", "sum", "mean"};
  const auto found = std::find(std::begin(names), std::end(names), reduce);
  STD_TORCH_CHECK(found != std::end(names), "reduce: expected max, min, sum or mean, got ", reduce);
  STD_TORCH_CHECK(features.dim() == 2, name, ": expected two dimensions, got ", to_string(features.sizes()));
  check_table(index);
  return {features.size(0), index.size(0), index.size(1), features.size(1), static_cast<Reduce>(found - names)};
}

}  // namespace paper_layers
