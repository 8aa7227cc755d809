// The argument checks of sample_uncertain_points, for the CPU and the CUDA kernels.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>

#include "common/uncertainty.h"

namespace paper_layers {

inline void check_sample_uncertain_points(const Tensor& logits, const std::optional<Tensor>& labels,
                                          const Tensor& points, int64_t count) {
  check_logits(logits, labels);
  constexpr int64_t longest = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(logits.size(2) <= longest && logits.size(3) <= longest,
                  "logits: expected height and width below 2^31, got ", to_string(logits.sizes()));
  STD_TORCH_CHECK(points.scalar_type() == ScalarType::Float && points.dim() == 3 &&
                      points.size(0) == logits.size(0) && points.size(2) == 2,
                  "points: expected float32 of shape (", logits.size(0), ", M, 2), got ", points.scalar_type(),
                  " of shape ", to_string(points.sizes()));
  check_same_device("points", points, "logits", logits);
  STD_TORCH_CHECK(0 <= count && count <= points.size(1), "count: expected from 0 to the number of points, ",
                  points.size(1), ", got ", count);
}

}  // namespace paper_layers
