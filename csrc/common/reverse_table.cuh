// The edges of a table of neighbours in the order of the rows that they lead to, so that each row gathers its
// gradient from them, always in the same order: nothing is added atomically.
#pragma once

#include "common/cuda_tensors.cuh"
#include "common/neighbor_table.h"

#include <array>
#include <cstdint>
#include <limits>
#include <optional>

#include <torch/csrc/stable/library.h>

namespace paper_layers {
namespace {

struct Sorted {
  Tensor values, order;
};

// Along a dimension; equal values stay in order.
inline Sorted sorted(const Tensor& tensor, int64_t dim = 0) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(tensor),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(dim), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// The number of ascending values that are less.
template <typename T>
C10_DEVICE int64_t count_less(const T* values, int64_t count, T than) {
  int64_t low = 0;
  for (int64_t high = count; low < high;) {
    const int64_t middle = low + (high - low) / 2;
    if (values[middle] < than) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The row of each edge.
template <typename Key, typename Row>
struct WriteKeys {
  Row row_of;
  int64_t rows;
  Key* keys;

  C10_DEVICE void operator()(int64_t edge) const {
    const int64_t row = row_of(edge);
    CUDA_KERNEL_ASSERT(-1 <= row && row < rows && "index: out of range");
    keys[edge] = static_cast<Key>(row < 0 || row >= rows ? -1 : row);
  }
};

template <typename Key>
struct WriteStarts {
  const Key* keys;
  int64_t edges;
  int64_t* starts;

  C10_DEVICE void operator()(int64_t row) const { starts[row] = count_less(keys, edges, static_cast<Key>(row)); }
};

// The row of all clouds that an edge of the table leads to; beyond all of them where it is out of range.
struct RowOfEdge {
  const int64_t* index;
  int64_t edges, cloud_edges, rows;

  RowOfEdge(const int64_t* index, const CloudTable& table)
      : index(index),
        edges(table.nodes * table.k),
        cloud_edges(table.cloud_nodes * table.k),
        rows(table.cloud_rows) {}

  C10_DEVICE int64_t operator()(int64_t edge) const {
    const int64_t row = index[edge];
    if (row >= rows) return INT64_MAX;
    return row < 0 ? row : row + first_row(edge, cloud_edges, edges, rows);
  }
};

struct ReverseTable {
  Tensor edges, starts;

  const int64_t* edge_data() const { return edges.const_data_ptr<int64_t>(); }
  const int64_t* start_data() const { return starts.const_data_ptr<int64_t>(); }
};

// row_of(edge) is a functor on the device; edges of negative rows lead nowhere. Like torch's own indexing, a row out
// of range stops the device's work with an assertion: the host could not know of it without waiting.
template <typename Row>
ReverseTable reverse_table(const Tensor& like, int64_t edges, int64_t rows, const Row& row_of) {
  const int32_t device = like.get_device_index();
  const Tensor starts = new_empty(like, {rows + 1}, ScalarType::Long);
  const auto build = [&](auto key, ScalarType dtype) {
    using Key = decltype(key);
    const Tensor keys = new_empty(like, {edges}, dtype);
    for_each_index<int64_t>(edges, device, WriteKeys<Key, Row>{row_of, rows, keys.mutable_data_ptr<Key>()});
    const Sorted result = sorted(keys);
    for_each_index<int64_t>(
        rows + 1, device,
        WriteStarts<Key>{result.values.const_data_ptr<Key>(), edges, starts.mutable_data_ptr<int64_t>()});
    return ReverseTable{result.order, starts};
  };
  if (rows <= std::numeric_limits<int32_t>::max()) return build(int32_t(), ScalarType::Int);
  return build(int64_t(), ScalarType::Long);
}

}  // namespace
}  // namespace paper_layers
