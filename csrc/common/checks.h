// Checks of arguments that the ops share, for the CPU and the CUDA kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/range.h"
#include "common/sizes.h"

namespace paper_layers {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string to_string(IntHeaderOnlyArrayRef sizes) {
  std::ostringstream text;
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "(") << sizes[i];
  text << (sizes.size() == 0 ? "()" : ")");
  return text.str();
}

inline bool equal(IntHeaderOnlyArrayRef a, IntHeaderOnlyArrayRef b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

inline void check_shape(const char* name, const Tensor& tensor, IntHeaderOnlyArrayRef shape) {
  STD_TORCH_CHECK(equal(tensor.sizes(), shape), name, ": expected shape ", to_string(shape), ", got ",
                  to_string(tensor.sizes()));
}

inline void check_floating(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  name, ": expected float32, float64, bfloat16 or float16, got ", dtype);
}

inline void check_same_device(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  STD_TORCH_CHECK(tensor.device() == other.device(), name, ": expected the device of ", other_name, ", type ",
                  static_cast<int>(other.device().type()), " index ", other.get_device_index(), ", got type ",
                  static_cast<int>(tensor.device().type()), " index ", tensor.get_device_index());
}

inline void check_same_dtype_and_device(const char* name, const Tensor& tensor, const char* other_name,
                                        const Tensor& other) {
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, ": expected the dtype of ", other_name, ", ",
                  other.scalar_type(), ", got ", tensor.scalar_type());
  check_same_device(name, tensor, other_name, other);
}

}  // namespace paper_layers
