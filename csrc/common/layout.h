// The order of images' elements in memory.
#pragma once

#include <cstdint>

#include <torch/headeronly/core/MemoryFormat.h>

#include "common/tensors.h"

namespace paper_layers {

// Elements in the order of channels_last: torch's rule, by which the stride of a side of 1 does not matter.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) == 1) continue;
    if (tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

using torch::headeronly::MemoryFormat;

inline MemoryFormat memory_format(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

inline Tensor to_contiguous(const Tensor& tensor, MemoryFormat format) {
  const bool done = format == MemoryFormat::ChannelsLast ? is_channels_last(tensor) : tensor.is_contiguous();
  return done ? tensor : torch::stable::contiguous(tensor, format);
}

}  // namespace paper_layers
