// Tables of neighbours: rows of other tensors, -1 where there is none.
#pragma once

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

inline void check_row(int64_t row, int64_t rows) {
  STD_TORCH_CHECK(-1 <= row && row < rows, "index: expected -1 or a row below ", rows, ", got ", row);
}

// `index` is data: read it before what it points to.
inline void check_index(const int64_t* index, int64_t count, int64_t rows) {
  bool wrong = false;
  for (int64_t i = 0; i < count; ++i) wrong |= index[i] < -1 || index[i] >= rows;
  for (int64_t i = 0; wrong && i < count; ++i) check_row(index[i], rows);
}

}  // namespace paper_layers
