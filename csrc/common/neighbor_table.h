// Tables of neighbours: rows of other tensors, -1 where there is none.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include <torch/headeronly/macros/Macros.h>

#include "common/checks.h"

namespace paper_layers {

// The row of all that a cloud's rows start at, from the node of all: no division for one cloud.
C10_HOST_DEVICE inline int64_t first_row(int64_t node, int64_t cloud_nodes, int64_t nodes, int64_t cloud_rows) {
  return cloud_nodes < nodes ? node / cloud_nodes * cloud_rows : 0;
}

// Sizes of a table (M, k), or of one of clouds (B, M, k) that number their rows from 0.
struct CloudTable {
  int64_t nodes, rows, k;           // of all clouds
  int64_t cloud_nodes, cloud_rows;  // of each

  int64_t start(int64_t node) const { return first_row(node, cloud_nodes, nodes, cloud_rows); }
};

// With so many rows in each cloud.
inline CloudTable cloud_table(const Tensor& index, int64_t rows) {
  STD_TORCH_CHECK((index.dim() == 2 || index.dim() == 3) && index.scalar_type() == ScalarType::Long,
                  "index: expected int64 of shape (M, k) or (B, M, k), got ", index.scalar_type(), " of shape ",
                  to_string(index.sizes()));
  const int64_t clouds = index.dim() == 3 ? index.size(0) : 1, nodes = index.size(-2), k = index.size(-1);
  STD_TORCH_CHECK(k <= std::numeric_limits<int32_t>::max(), "index: expected fewer columns, got ", k);
  return {checked_product({clouds, nodes}), checked_product({clouds, rows}), k, nodes, rows};
}

// Checks that a tensor has rows (N, C) for a table, or (B, N, C) for a table of clouds.
inline void check_rows(const char* name, const Tensor& rows, const Tensor& index) {
  STD_TORCH_CHECK(rows.dim() == 2 || rows.dim() == 3, name, ": expected two dimensions or three, got ",
                  to_string(rows.sizes()));
  STD_TORCH_CHECK(index.dim() == rows.dim() && (index.dim() == 2 || index.size(0) == rows.size(0)),
                  "index: expected the clouds of ", name, ", ", to_string(rows.sizes()), ", got ",
                  to_string(index.sizes()));
}

// A tensor's shape with another number of rows.
inline std::vector<int64_t> with_row_count(const Tensor& like, int64_t rows) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes[sizes.size() - 2] = rows;
  return sizes;
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
