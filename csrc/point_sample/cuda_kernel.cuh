// The work of one thread in point sampling: one channel of one point, one pixel, or one point.
#pragma once

#include <cstdint>

#include "common/bilinear.h"
#include "common/cuda_tensors.cuh"

namespace paper_layers {
namespace {

// A tensor (images or rows, channels, pixels or points), either of the last two next to one another.
struct Strides {
  int64_t outer, channel, inner;

  Strides(int64_t channels, int64_t inner_size, bool channels_last)
      : outer(channels * inner_size), channel(channels_last ? 1 : inner_size), inner(channels_last ? channels : 1) {}
  C10_DEVICE int64_t operator()(int64_t o, int64_t c, int64_t i) const { return o * outer + c * channel + i * inner; }
};

// One level and the points, for all kernels.
template <typename C>
struct LevelPoints {
  int32_t height, width;
  C scale_x, scale_y;
  Sampling how;
  int64_t images, points;
  const C* coordinates;
  const int64_t* image;  // or null

  C10_DEVICE AxisTaps<C> x(int64_t n) const { return axis_taps(coordinates[2 * n], scale_x, width, how); }
  C10_DEVICE AxisTaps<C> y(int64_t n) const { return axis_taps(coordinates[2 * n + 1], scale_y, height, how); }
  C10_DEVICE Taps<C> taps(int64_t n) const { return make_taps(x(n), y(n), width); }
  // The image of point n. As in torch's own indexing, a number out of range stops the device's work with an assertion:
  // the host could not know of it without waiting.
  C10_DEVICE int64_t image_of(int64_t n) const {
    const int64_t row = n / points;
    if (image == nullptr) return row;
    CUDA_KERNEL_ASSERT(0 <= image[row] && image[row] < images && "boxes: image number out of range");
    return image[row];
  }
};

// (point, channel) of a thread: neighbours in memory are neighbours in a warp.
struct PointChannel {
  int64_t count, channels;  // points of all rows; channels of the level
  bool channels_last;

  C10_DEVICE int64_t point(int64_t index) const { return channels_last ? index / channels : index % count; }
  C10_DEVICE int64_t channel(int64_t index) const { return channels_last ? index % channels : index / count; }
};

template <typename T, typename C>
struct Sample {
  LevelPoints<C> level;
  PointChannel split;
  int64_t first_channel;
  Strides in, out;
  const T* map;
  T* output;

  C10_DEVICE void operator()(int64_t index) const {
    using A = Accumulator<T>;
    const int64_t n = split.point(index), c = split.channel(index);
    const Taps<C> taps = level.taps(n);
    const T* from = map + in(level.image_of(n), c, 0);
    A sum = 0;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (taps.pixels[t] >= 0) sum += static_cast<A>(taps.weights[t]) * static_cast<A>(from[taps.pixels[t] * in.inner]);
    }
    output[out(n / level.points, first_channel + c, n % level.points)] = static_cast<T>(sum);
  }
};

// The pixel, counted over all images, of each tap of each point: edge 4 n + tap; -1 is none.
template <typename C>
struct PixelOfTap {
  LevelPoints<C> level;

  C10_DEVICE int64_t operator()(int64_t edge) const {
    const int64_t n = edge / 4;
    const int32_t pixel = level.taps(n).pixels[edge % 4];
    return pixel < 0 ? -1 : level.image_of(n) * level.height * level.width + pixel;
  }
};

// The gradient of one channel of one pixel, from the taps that take it, always in the same order.
template <typename T, typename C>
struct GatherPixel {
  LevelPoints<C> level;
  PointChannel split;  // with pixels of all images for points
  int64_t first_channel;
  Strides in, out;
  const int64_t *edges, *starts;
  const T* grad;
  T* grad_map;

  C10_DEVICE void operator()(int64_t index) const {
    using A = Accumulator<T>;
    const int64_t pixel = split.point(index), c = split.channel(index), size = int64_t(level.height) * level.width;
    A sum = 0;
    for (int64_t s = starts[pixel]; s < starts[pixel + 1]; ++s) {
      const int64_t n = edges[s] / 4;
      const A weight = static_cast<A>(level.taps(n).weights[edges[s] % 4]);
      sum += weight * static_cast<A>(grad[out(n / level.points, first_channel + c, n % level.points)]);
    }
    grad_map[in(pixel / size, c, pixel % size)] = static_cast<T>(sum);
  }
};

// Adds the gradient of a point from one level.
template <typename T, typename C>
struct AddPoint {
  LevelPoints<C> level;
  int64_t channels, first_channel;
  Strides in, out;
  const T *map, *grad;
  C* grad_points;

  C10_DEVICE void operator()(int64_t n) const {
    using A = Accumulator<T>;
    const AxisTaps<C> x = level.x(n), y = level.y(n);
    const Taps<C> taps = make_taps(x, y, level.width);
    const T* from = map + in(level.image_of(n), 0, 0);
    const T* g = grad + out(n / level.points, first_channel, n % level.points);
    A dots[4] = {};
    for (int64_t c = 0; c < channels; ++c) {
      const A value = static_cast<A>(g[c * out.channel]);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        if (taps.pixels[t] >= 0) {
          dots[t] += value * static_cast<A>(from[c * in.channel + taps.pixels[t] * in.inner]);
        }
      }
    }
    add_point_gradient(x, y, level.scale_x, level.scale_y, dots, grad_points + 2 * n);
  }
};

}  // namespace
}  // namespace paper_layers
