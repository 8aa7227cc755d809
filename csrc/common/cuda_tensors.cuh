// Device-side views of tensors: packs of elements, and rows of channels in packs.
#pragma once

#include "common/cuda_utils.cuh"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "common/tensors.h"

namespace paper_layers {
namespace {

inline bool aligned(std::initializer_list<Tensor> tensors, uintptr_t bytes) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
  });
}

template <typename T, int N>
const Pack<T, N>* packs(const Tensor& tensor) {
  return static_cast<const Pack<T, N>*>(tensor.const_data_ptr());
}

template <typename T, int N>
Pack<T, N>* mutable_packs(const Tensor& tensor) {
  return static_cast<Pack<T, N>*>(tensor.mutable_data_ptr());
}

// Rows of channels, in packs of V of them.
template <typename Index_, int V_>
struct Rows {
  using Index = Index_;
  static constexpr int V = V_;

  int64_t packs;  // of a row
  Divider<Index> by_packs;

  explicit Rows(int64_t channels) : packs(channels / V), by_packs(std::max<int64_t>(packs, 1)) {}
};

// Calls function(rows): numbers of 32 bits where they reach the largest one that is divided, packs of several elements
// where channels allow it.
template <typename T, typename Function>
void with_rows(int64_t largest, int64_t channels, std::initializer_list<Tensor> tensors, Function function) {
  constexpr int V = 16 / sizeof(Accumulator<T>);
  if (largest > std::numeric_limits<int32_t>::max()) {
    function(Rows<int64_t, 1>(channels));
  } else if (channels % V == 0 && aligned(tensors, 16)) {
    function(Rows<int32_t, V>(channels));
  } else {
    function(Rows<int32_t, 1>(channels));
  }
}

}  // namespace
}  // namespace paper_layers
