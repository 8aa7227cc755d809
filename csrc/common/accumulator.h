// Accumulation type: double for double, otherwise float.
#pragma once

#include <type_traits>

#include <torch/headeronly/core/ScalarType.h>

namespace paper_layers {

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline torch::headeronly::ScalarType accumulation_dtype(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace paper_layers
