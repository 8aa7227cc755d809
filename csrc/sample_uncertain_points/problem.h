// The argument checks of sample_uncertain_points, for the CPU and the CUDA kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/bilinear.h"
#include "common/uncertainty.h"

namespace paper_layers {

inline void check_sample_uncertain_points(const Tensor& logits, const MaybeTensor& labels,
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

// Without pixels all logits are zero, so two classes tell as much as all of them.
inline LogitMaps sampled_maps(const Tensor& logits) {
  LogitMaps maps = logit_maps(logits);
  if (maps.pixels() == 0) maps.classes = std::min<int64_t>(maps.classes, 2);
  return maps;
}

// The four pixels around a point, as offsets into the map of a class, and their weights. Of a pixel outside the offset
// is 0 and must not be looked at.
struct PointTaps {
  int64_t offsets[4];
  float weights[4];
  bool inside[4];

  C10_HOST_DEVICE PointTaps(const LogitMaps& maps, const float* point) {
    const int32_t width = static_cast<int32_t>(maps.width), height = static_cast<int32_t>(maps.height);
    const AxisTaps<float> x = axis_taps(point[0], static_cast<float>(width), width, {});
    const AxisTaps<float> y = axis_taps(point[1], static_cast<float>(height), height, {});
    const int64_t first = y.first * maps.row_stride + x.first * maps.column_stride;
    for (int i = 0; i < 4; ++i) {
      const bool right = i & 1, bottom = i & 2;
      // Without branches, which at the edges of small maps could not be foreseen.
      inside[i] = (right ? x.has_second : x.has_first) & (bottom ? y.has_second : y.has_first);
      const int64_t offset = first + (bottom ? maps.row_stride : 0) + (right ? maps.column_stride : 0);
      offsets[i] = offset & -static_cast<int64_t>(inside[i]);
      weights[i] = (right ? x.fraction : 1 - x.fraction) * (bottom ? y.fraction : 1 - y.fraction);
    }
  }
};

}  // namespace paper_layers
