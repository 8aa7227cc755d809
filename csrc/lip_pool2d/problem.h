// The argument checks of lip_pool2d and the problem that follows from them, for the CPU and the CUDA kernels.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/layout.h"
#include "common/range.h"
#include "common/tensors.h"

namespace paper_layers {

using Sizes = std::array<int64_t, 4>;

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

// torch's pools, too, take 32-bit numbers here, and 64-bit arithmetic on them cannot overflow.
inline void check_pair(const char* name, const std::vector<int64_t>& pair, int64_t minimum) {
  constexpr int64_t maximum = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(pair.size() == 2, name, ": expected two numbers, got ", pair.size());
  for (const int64_t value : pair) {
    STD_TORCH_CHECK(minimum <= value && value <= maximum, name, ": expected numbers from ", minimum, " to ", maximum,
                    ", got ", to_string(pair));
  }
}

inline Side make_side(int64_t length, int64_t kernel, int64_t stride, int64_t padding, bool ceil_mode) {
  STD_TORCH_CHECK(length >= 1, "input: expected at least one row and one column, got ", length);
  STD_TORCH_CHECK(2 * padding <= kernel, "padding: expected at most half of kernel_size ", kernel, ", got ", padding);
  const int64_t largest = length + 2 * padding + (ceil_mode ? stride - 1 : 0);
  STD_TORCH_CHECK(kernel <= largest, "kernel_size: expected at most the padded input",
                  ceil_mode ? " plus stride - 1, " : ", ", largest, ", got ", kernel);
  int64_t outputs = (largest - kernel) / stride + 1;
  // Every window starts inside the image or its left padding.
  if (ceil_mode && (outputs - 1) * stride >= length + padding) --outputs;
  // Positions of the kernel that lie beyond the image for every window are left out: they would cost memory.
  const int64_t before = std::min(padding, (outputs - 1) * stride);
  const int64_t reach = std::min(kernel - (padding - before), length + before);
  return {length, outputs, reach, outputs > 1 ? stride : reach, before};
}

inline LipPool2dProblem lip_pool2d_problem(const Tensor& input, const Tensor& logit,
                                           const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                                           const std::vector<int64_t>& padding, bool ceil_mode) {
  check_floating("input", input);
  STD_TORCH_CHECK(input.dim() == 4, "input: expected shape (N, C, H, W), got ", to_string(input.sizes()));
  const Sizes full = {input.size(0), input.size(1), input.size(2), input.size(3)};
  const Sizes shared = {full[0], 1, full[2], full[3]};
  STD_TORCH_CHECK(equal(logit.sizes(), full) || equal(logit.sizes(), shared), "logit: expected shape ",
                  to_string(full), " or ", to_string(shared), ", got ", to_string(logit.sizes()));
  check_same_dtype_and_device("logit", logit, "input", input);
  check_pair("kernel_size", kernel_size, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  constexpr int64_t longest = int64_t(1) << 62;
  STD_TORCH_CHECK(full[2] <= longest && full[3] <= longest, "input: expected height and width up to 2^62, got ",
                  to_string(full));

  LipPool2dProblem problem;
  problem.height = make_side(full[2], kernel_size[0], stride[0], padding[0], ceil_mode);
  problem.width = make_side(full[3], kernel_size[1], stride[1], padding[1], ceil_mode);
  problem.images = full[0];
  problem.channels = full[1];
  problem.channels_last = is_channels_last(input);
  problem.shared = logit.size(1) != input.size(1);
  return problem;
}

// On the CPU: elements of the largest vectors; the least work for a thread; the widest plane, and the largest image of
// few channels, that are packed.
constexpr int64_t kVectorElements = 16, kGrainElements = 4096, kNarrow = 24, kPackedPixels = 4096;

// True if the kernels of the CPU pack planes side by side: the same for every image of these sizes.
inline bool is_packed(const LipPool2dProblem& problem) {
  const int64_t pixels = problem.height.length * problem.width.length;
  if (problem.shared || pixels > kPackedPixels) return false;
  return problem.channels_last ? problem.channels < kVectorElements : problem.width.length <= kNarrow;
}

inline Sizes output_sizes(const LipPool2dProblem& problem) {
  return {problem.images, problem.channels, problem.height.outputs, problem.width.outputs};
}

// Grad and output of the backward.
inline void check_like_output(const char* name, const Tensor& tensor, const Tensor& input,
                              const LipPool2dProblem& problem) {
  check_shape(name, tensor, output_sizes(problem));
  check_same_dtype_and_device(name, tensor, "input", input);
}

inline MemoryFormat memory_format(const LipPool2dProblem& problem) {
  return memory_format(problem.channels_last);
}

// A new tensor on input's device, in the problem's layout.
inline Tensor new_empty(const Tensor& input, const Sizes& sizes, ScalarType dtype, const LipPool2dProblem& problem) {
  return torch::stable::empty(sizes, dtype, std::nullopt, input.device(), std::nullopt, memory_format(problem));
}

}  // namespace paper_layers
