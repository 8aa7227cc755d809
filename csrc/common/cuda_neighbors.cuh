// The neighbours of a node, from a table.
#pragma once

#include <cstdint>

#include "common/cuda_tensors.cuh"

namespace paper_layers {
namespace {

// Rows that are loaded at once.
constexpr int kBatch = 4;

// The neighbours of the nodes. As in torch's own indexing, a row out of range stops the device's work with an
// assertion: the host could not know of it without waiting.
struct NeighborRows {
  const int64_t* index;
  int64_t k, rows;

  // Calls body(column, row's pack) for the neighbours of a node, in order. Missing ones load row 0, so that no load
  // waits for a branch; there is a row.
  template <typename Packed, typename Body>
  C10_DEVICE void each(int64_t node, const Packed* input, int64_t packs, int64_t pack, Body body) const {
    const int64_t* columns = index + node * k;
    for (int64_t first = 0; first < k; first += kBatch) {
      int64_t row[kBatch];
      Packed values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        row[i] = first + i < k ? columns[first + i] : -1;
        CUDA_KERNEL_ASSERT(-1 <= row[i] && row[i] < rows && "index: out of range");
        if (row[i] >= rows) row[i] = -1;  // where assertions are compiled out, nothing else is read for it
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) values[i] = input[(row[i] < 0 ? 0 : row[i]) * packs + pack];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (row[i] >= 0) body(static_cast<int32_t>(first + i), values[i]);
      }
    }
  }
};

}  // namespace
}  // namespace paper_layers
