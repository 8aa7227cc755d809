// The argument checks of the spectral linear layer's ops.
#pragma once

#include <cstdint>

#include "common/tensors.h"

namespace paper_layers {

// Rows of the weight are the layer's outputs, its columns the inputs.
struct Matrix {
  int64_t rows, columns;
};

inline Matrix matrix(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected shape (M, N), got ", to_string(tensor.sizes()));
  return {tensor.size(0), tensor.size(1)};
}

inline void check_beside(const char* name, const Tensor& tensor, IntHeaderOnlyArrayRef shape, const Tensor& weight) {
  check_floating(name, tensor);
  check_shape(name, tensor, shape);
  check_same_device(name, tensor, "weight", weight);
}

// The same, in the weight's dtype.
inline void check_like(const char* name, const Tensor& tensor, IntHeaderOnlyArrayRef shape, const Tensor& weight) {
  check_shape(name, tensor, shape);
  check_same_dtype_and_device(name, tensor, "weight", weight);
}

}  // namespace paper_layers
