// The argument checks of uncertain_points, for the CPU and the CUDA kernels.
#pragma once

#include <cstdint>

#include "common/uncertainty.h"

namespace paper_layers {

inline void check_uncertain_points(const Tensor& logits, const MaybeTensor& labels, int64_t num_points) {
  check_logits(logits, labels);
  STD_TORCH_CHECK(num_points >= 0, "num_points: expected at least 0, got ", num_points);
}

// The logits, copied only if their pixels are not equally far apart.
inline Tensor with_flat_pixels(const Tensor& logits) {
  return logit_maps(logits).flat() ? logits : to_contiguous(logits);
}

}  // namespace paper_layers
