// The argument checks of sample_uncertain_points, for the CPU and the CUDA kernels.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>

#include "common/bilinear.h"
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

// The four pixels around a point, as offsets into the map of a class, and their weights.
struct PointTaps {
  static constexpr int64_t kOutside = -1;

  int64_t offsets[4];
  float weights[4];

  PointTaps() = default;
  C10_HOST_DEVICE PointTaps(const LogitMaps& maps, const float* point) {
    const int32_t width = static_cast<int32_t>(maps.width), height = static_cast<int32_t>(maps.height);
    const AxisTaps<float> x = axis_taps(point[0], static_cast<float>(width), width, {});
    const AxisTaps<float> y = axis_taps(point[1], static_cast<float>(height), height, {});
    for (int i = 0; i < 4; ++i) {
      const bool right = i & 1, bottom = i & 2;
      const bool there = (right ? x.has_second : x.has_first) && (bottom ? y.has_second : y.has_first);
      offsets[i] = there ? (y.first + bottom) * maps.row_stride + (x.first + right) * maps.column_stride : kOutside;
      weights[i] = (right ? x.fraction : 1 - x.fraction) * (bottom ? y.fraction : 1 - y.fraction);
    }
  }

  template <typename A, typename T>
  C10_HOST_DEVICE A sample(const T* map) const {
    A sum = 0;
    for (int i = 0; i < 4; ++i) sum += offsets[i] == kOutside ? A(0) : A(weights[i]) * A(map[offsets[i]]);
    return sum;
  }
};

}  // namespace paper_layers
