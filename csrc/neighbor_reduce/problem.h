// The argument checks of neighbor_reduce and the problem that follows from them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "common/checks.h"

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
  STD_TORCH_CHECK(index.dim() == 2 && index.scalar_type() == ScalarType::Long,
                  "index: expected int64 of shape (M, k), got ", index.scalar_type(), " of shape ",
                  to_string(index.sizes()));
  STD_TORCH_CHECK(index.size(1) <= std::numeric_limits<int32_t>::max(), "index: expected fewer columns, got ",
                  index.size(1));
  return {features.size(0), index.size(0), index.size(1), features.size(1), static_cast<Reduce>(found - names)};
}

// `index` is data: read it before what it points to.
inline void check_index(const int64_t* index, int64_t count, int64_t rows) {
  const int64_t largest = count > 0 ? *std::max_element(index, index + count) : -1;
  STD_TORCH_CHECK(largest < rows, "index: expected rows below ", rows, ", got ", largest);
}

}  // namespace paper_layers
