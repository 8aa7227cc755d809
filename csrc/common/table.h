// Tables of neighbours: rows of other tensors, -1 where there is none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/checks.h"

namespace paper_layers {

inline void check_table(const Tensor& index) {
  STD_TORCH_CHECK(index.dim() == 2 && index.scalar_type() == ScalarType::Long,
                  "index: expected int64 of shape (M, k), got ", index.scalar_type(), " of shape ",
                  to_string(index.sizes()));
  STD_TORCH_CHECK(index.size(1) <= std::numeric_limits<int32_t>::max(), "index: expected fewer columns, got ",
                  index.size(1));
}

// `index` is data: read it before what it points to.
inline void check_index(const int64_t* index, int64_t count, int64_t rows) {
  const int64_t largest = count > 0 ? *std::max_element(index, index + count) : -1;
  STD_TORCH_CHECK(largest < rows, "index: expected rows below ", rows, ", got ", largest);
}

}  // namespace paper_layers
