// What lip_pool2d computes over, as its CPU kernels see it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/range.h"

namespace paper_layers {

// The windows along one side of the image.
struct Side {
  int64_t length, outputs, kernel, stride, padding;

  int64_t start(int64_t output) const { return output * stride - padding; }
  Range taps(int64_t output) const {
    return intersection({0, length}, {start(output), start(output) + kernel});
  }
  Range taps(Range of) const { return {taps(of.begin).begin, taps(of.end - 1).end}; }

  // The outputs whose windows hold a position; empty where there is none.
  Range covering(int64_t position) const {
    const int64_t above = position + padding - kernel + 1;
    return {above > 0 ? (above + stride - 1) / stride : 0, std::min(outputs, (position + padding) / stride + 1)};
  }
  int64_t covering_at_most() const { return (kernel + stride - 1) / stride; }
  // The outputs whose windows reach into a range of positions; the first output where there is none.
  Range reaching(Range positions) const {
    const Range found = {covering(positions.begin).begin, covering(positions.end - 1).end};
    return found.size() > 0 ? found : Range{0, 1};
  }
};

// A plane of pixels in row-major order. In NCHW a pixel is one number; in channels_last it is all channels.
template <typename T>
struct Plane {
  T* data;
  int64_t width, depth;
  T* at(int64_t row, int64_t column) const { return data + (row * width + column) * depth; }
};

struct LipPool2dProblem {
  Side height, width;
  int64_t images, channels;
  bool channels_last;
  bool shared;  // the logits have one channel, for all of the input's

  int64_t depth() const { return channels_last ? channels : 1; }
  int64_t logit_depth() const { return shared ? 1 : depth(); }
  int64_t planes_per_image() const { return channels_last ? 1 : channels; }
  int64_t planes() const { return images * planes_per_image(); }

  template <typename T>
  Plane<T> input_plane(T* data, int64_t plane) const {
    return {data + plane * height.length * width.length * depth(), width.length, depth()};
  }
  template <typename T>
  Plane<T> logit_plane(T* data, int64_t plane) const {
    const int64_t index = shared ? plane / planes_per_image() : plane;
    return {data + index * height.length * width.length * logit_depth(), width.length, logit_depth()};
  }
  template <typename T>
  Plane<T> output_plane(T* data, int64_t plane) const {
    return {data + plane * height.outputs * width.outputs * depth(), width.outputs, depth()};
  }
};

}  // namespace paper_layers
