// The neighbours of a node, from a table.
#pragma once

#include <cstdint>

#include "common/cuda_tensors.cuh"
#include "common/neighbor_table.h"

namespace paper_layers {
namespace {

// Rows that are loaded at once.
constexpr int kBatch = 4;

// The neighbours of the nodes. As in torch's own indexing, a row out of range stops the device's work with an
// assertion: the host could not know of it without waiting.
struct NeighborRows {
  const int64_t* index;
  int64_t k, nodes, cloud_nodes, rows;  // rows of a cloud

  // Without rows there are no neighbours.
  NeighborRows(const int64_t* index, const CloudTable& table)
      : index(index),
        k(table.rows > 0 ? table.k : 0),
        nodes(table.nodes),
        cloud_nodes(table.cloud_nodes),
        rows(table.cloud_rows) {}

  C10_DEVICE int64_t start(int64_t node) const { return first_row(node, cloud_nodes, nodes, rows); }

  C10_DEVICE bool any(int64_t node) const {
    for (int64_t column = 0; column < k; ++column) {
      if (index[node * k + column] >= 0) return true;
    }
    return false;
  }

  // Calls body(column, row's pack) for the neighbours of a node, in order. Missing ones load row 0, so that no load
  // waits for a branch; there is a row.
  template <typename Packed, typename Body>
  C10_DEVICE void each(int64_t node, const Packed* input, int64_t packs, int64_t pack, Body body) const {
    const int64_t* columns = index + node * k;
    const int64_t offset = start(node);
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
      for (int i = 0; i < kBatch; ++i) values[i] = input[(row[i] < 0 ? 0 : offset + row[i]) * packs + pack];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (row[i] >= 0) body(static_cast<int32_t>(first + i), values[i]);
      }
    }
  }
};

}  // namespace
}  // namespace paper_layers
