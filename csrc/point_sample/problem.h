// The argument checks of point_sample and the problem that follows from them, for the CPU and the CUDA kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/bilinear.h"
#include "common/layout.h"
#include "common/tensors.h"

namespace paper_layers {

using MaybeNumbers = std::optional<std::vector<double>>;

struct Level {
  int32_t height, width;
  int64_t channels, first_channel;  // the first one among the channels of all levels
  double scale_x, scale_y;          // pixels for each unit of the points

  int64_t pixels() const { return int64_t(height) * width; }
};

struct PointSampleProblem {
  int64_t images, rows, points, channels;  // points in each row of points, channels of all levels
  bool channels_last;
  Sampling how;
  std::vector<Level> levels;

  // The place in an output of the first channel of a point, which is counted over all rows; and back.
  int64_t place(int64_t point) const {
    return channels_last ? point * channels : point / points * points * channels + point % points;
  }
  int64_t point_at(int64_t place) const {
    return channels_last ? place / channels : place / (points * channels) * points + place % (points * channels);
  }
  int64_t channel_step() const { return channels_last ? 1 : points; }
  MemoryFormat format() const { return memory_format(channels_last); }
};

// Adds the gradient of one point from one level. dots: for each tap the sum over channels of gradient times value, 0
// outside.
template <typename C, typename A>
C10_HOST_DEVICE inline void add_point_gradient(AxisTaps<C> x, AxisTaps<C> y, C scale_x, C scale_y, const A* dots,
                                               C* grad) {
  const C d[4] = {static_cast<C>(dots[0]), static_cast<C>(dots[1]), static_cast<C>(dots[2]), static_cast<C>(dots[3])};
  if (x.moves) grad[0] += scale_x * ((d[1] - d[0]) * (1 - y.fraction) + (d[3] - d[2]) * y.fraction);
  if (y.moves) grad[1] += scale_y * ((d[2] - d[0]) * (1 - x.fraction) + (d[3] - d[1]) * x.fraction);
}

// The points' coordinates, (x, y) after (x, y), in float or double.
class Coordinates {
 public:
  explicit Coordinates(const Tensor& points)
      : data_(points.const_data_ptr()), doubles_(points.scalar_type() == ScalarType::Double) {}
  template <typename Function>
  void visit(Function function) const {
    if (doubles_) function(static_cast<const double*>(data_));
    else function(static_cast<const float*>(data_));
  }

 private:
  const void* data_;
  bool doubles_;
};

inline bool one_of(const char* name, const std::string& value, const char* no, const char* yes) {
  STD_TORCH_CHECK(value == no || value == yes, name, ": expected ", no, " or ", yes, ", got ", value);
  return value == yes;
}

inline Level make_level(const Tensor& map, int64_t first_channel, std::optional<double> scale) {
  STD_TORCH_CHECK(map.dim() == 4 && map.size(2) > 0 && map.size(3) > 0,
                  "maps: expected shape (N, C, H, W) with pixels, got ", to_string(map.sizes()));
  const int64_t height = map.size(2), width = map.size(3);
  STD_TORCH_CHECK(height <= std::numeric_limits<int32_t>::max() / width,
                  "maps: expected fewer than 2^31 pixels in a plane, got ", to_string(map.sizes()));
  return {static_cast<int32_t>(height),   static_cast<int32_t>(width),     map.size(1), first_channel,
          scale.value_or(double(width)), scale.value_or(double(height))};
}

inline PointSampleProblem point_sample_problem(const Tensor& points, const MaybeTensor& image,
                                               const std::vector<Tensor>& maps,
                                               const MaybeNumbers& spatial_scale,
                                               const std::string& mode, const std::string& padding) {
  STD_TORCH_CHECK(!maps.empty(), "maps: expected at least one, got none");
  STD_TORCH_CHECK(points.dim() == 3 && points.size(2) == 2, "points: expected shape (R, P, 2), got ",
                  to_string(points.sizes()));
  STD_TORCH_CHECK(points.scalar_type() == ScalarType::Float || points.scalar_type() == ScalarType::Double,
                  "points: expected float32 or float64, got ", points.scalar_type());
  STD_TORCH_CHECK(!spatial_scale || spatial_scale->size() == maps.size(), "spatial_scale: expected ", maps.size(),
                  " numbers, got ", spatial_scale ? spatial_scale->size() : 0);
  PointSampleProblem problem{};
  problem.how = {one_of("mode", mode, "bilinear", "nearest"), one_of("padding", padding, "zeros", "border")};
  for (size_t level = 0; level < maps.size(); ++level) {
    const Tensor& map = maps[level];
    check_floating("maps", map);
    check_same_dtype_and_device("maps", map, "the first", maps[0]);
    problem.levels.push_back(make_level(
        map, problem.channels, spatial_scale ? std::optional<double>((*spatial_scale)[level]) : std::nullopt));
    STD_TORCH_CHECK(!__builtin_add_overflow(problem.channels, map.size(1), &problem.channels),
                    "maps: expected fewer than 2^63 channels, got more");
    STD_TORCH_CHECK(map.size(0) == maps[0].size(0), "maps: expected ", maps[0].size(0), " images, got ", map.size(0));
  }
  problem.images = maps[0].size(0);
  problem.rows = points.size(0);
  problem.points = points.size(1);
  problem.channels_last = is_channels_last(maps[0]);
  check_same_device("points", points, "maps", maps[0]);
  if (image) {
    STD_TORCH_CHECK(image->scalar_type() == ScalarType::Long && image->dim() == 1 && image->size(0) == problem.rows,
                    "image: expected int64 of shape (", problem.rows, ",), got ", image->scalar_type(), " of shape ",
                    to_string(image->sizes()));
    check_same_device("image", *image, "maps", maps[0]);
  } else {
    STD_TORCH_CHECK(problem.rows == problem.images, "points: expected ", problem.images, " rows, got ", problem.rows);
  }
  return problem;
}

// Points or channels are next to one another. No view: a view that a custom Function returns must not be changed
// in place, as an activation does.
inline Tensor new_output(const Tensor& map, const PointSampleProblem& problem) {
  const int64_t channels = std::max<int64_t>(1, problem.channels), points = std::max<int64_t>(1, problem.points);
  const bool last = problem.channels_last;
  const int64_t sizes[] = {problem.rows, problem.channels, problem.points};
  const int64_t strides[] = {checked_product({channels, points}), last ? 1 : points, last ? channels : 1};
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(map.get(), &dtype));
  AtenTensorHandle output = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(3, sizes, strides, dtype, static_cast<int32_t>(map.device().type()),
                                                  map.get_device_index(), &output));
  return Tensor(output);
}

inline Tensor new_grad_map(const Tensor& map, const PointSampleProblem& problem) {
  return torch::stable::empty(map.sizes(), map.scalar_type(), std::nullopt, map.device(), std::nullopt,
                              problem.format());
}

// The arguments that the three ops have in common, checked and contiguous.
struct PointSampleArguments {
  PointSampleProblem problem;
  Tensor points;
  MaybeTensor image;

  PointSampleArguments(const Tensor& points, const MaybeTensor& image, const std::vector<Tensor>& maps,
                       const MaybeNumbers& spatial_scale, const std::string& mode, const std::string& padding)
      : problem(point_sample_problem(points, image, maps, spatial_scale, mode, padding)),
        points(to_contiguous(points)),
        image(image) {
    make_contiguous(this->image);
  }

  const int64_t* image_data() const { return image ? image->const_data_ptr<int64_t>() : nullptr; }

  // The gradient of the output, checked and in the output's layout.
  Tensor output_grad(const Tensor& grad, const Tensor& map) const {
    check_shape("grad", grad, {problem.rows, problem.channels, problem.points});
    check_same_dtype_and_device("grad", grad, "maps", map);
    return to_contiguous(problem.channels_last ? torch::stable::transpose(grad, 1, 2) : grad);
  }
};

}  // namespace paper_layers
