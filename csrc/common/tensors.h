// Host code that the ops share: contiguous tensors, new tensors, and a call with a tensor's element type.
#pragma once

#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include "common/accumulator.h"
#include "common/checks.h"

namespace paper_layers {

using MaybeTensor = std::optional<Tensor>;
using torch::stable::empty_like;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::zero_;

// Calls function with an element of the dtype: float32, float64, bfloat16 or float16.
template <typename Function>
void dispatch(ScalarType dtype, const Function& function) {
  THO_DISPATCH_V2(dtype, "paper_layers", AT_WRAP([&] { function(scalar_t{}); }), ScalarType::Float, ScalarType::Double,
                  ScalarType::BFloat16, ScalarType::Half);
}

// The same for accumulators: float32 or float64.
template <typename Function>
void dispatch_accumulator(ScalarType dtype, const Function& function) {
  THO_DISPATCH_V2(dtype, "paper_layers", AT_WRAP([&] { function(scalar_t{}); }), ScalarType::Float, ScalarType::Double);
}

// torch's `contiguous` and `to` call the dispatcher even if there is nothing to do.
inline Tensor to_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <typename... Tensors>
void make_contiguous(Tensors&... tensors) {
  ((tensors = to_contiguous(tensors)), ...);
}
inline void make_contiguous(MaybeTensor& tensor) {
  if (tensor) tensor = to_contiguous(*tensor);
}

inline Tensor to_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

inline Tensor sum_over(const Tensor& tensor, int64_t dim, bool keepdim = false) {
  return torch::stable::sum(tensor, IntHeaderOnlyArrayRef(dim), keepdim);
}

}  // namespace paper_layers
