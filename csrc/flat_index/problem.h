// The argument checks of flat_index, for the CPU and the CUDA kernels.
#pragma once

#include <cstdint>

#include "common/neighbor_table.h"
#include "common/tensors.h"

namespace paper_layers {

// Clouds of so many rows, each with so many entries in the table.
struct FlatIndexProblem {
  int64_t clouds, entries, rows;
};

inline FlatIndexProblem flat_index_problem(const Tensor& index, int64_t rows) {
  STD_TORCH_CHECK(index.dim() == 3 && index.scalar_type() == ScalarType::Long,
                  "index: expected int64 of shape (B, M, k), got ", index.scalar_type(), " of shape ",
                  to_string(index.sizes()));
  STD_TORCH_CHECK(rows >= 0, "rows: expected at least 0, got ", rows);
  if (index.numel() == 0) return {0, 0, rows};
  checked_product({index.size(0), rows});
  return {index.size(0), index.size(1) * index.size(2), rows};
}

inline Tensor new_flat_index(const Tensor& index) {
  return new_empty(index, {checked_product({index.size(0), index.size(1)}), index.size(2)});
}

}  // namespace paper_layers
