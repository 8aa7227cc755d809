// Helpers of the CUDA kernels: division by numbers known at launch, packs of elements, and the launch itself.
#pragma once

// Before any of torch's headers: they declare the CUDA part of the shim only under it.
#ifndef USE_CUDA
#define USE_CUDA
#endif

#include <cstdint>
#include <limits>

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/Exception.h>

#include "common/accumulator.h"

namespace paper_layers {

// N elements that are loaded and stored at once.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T values[N];

  C10_DEVICE T& operator[](int i) { return values[i]; }
  C10_DEVICE const T& operator[](int i) const { return values[i]; }
};

// n / divisor for n >= 0.
template <typename Index>
class Divider {
 public:
  explicit Divider(int64_t divisor) : divisor_(static_cast<Index>(divisor)) {}
  C10_DEVICE Index operator()(Index n) const { return n / divisor_; }

 private:
  Index divisor_;
};

// The same by a multiplication and a shift (Granlund and Montgomery, "Division by invariant integers using
// multiplication", 1994): a division takes a GPU some twenty instructions.
template <>
class Divider<int32_t> {
 public:
  explicit Divider(int64_t divisor) {
    while ((int64_t(1) << shift_) < divisor) ++shift_;
    const uint64_t excess = (int64_t(1) << shift_) - divisor;
    multiplier_ = static_cast<uint32_t>((excess << 32) / divisor + 1);
  }
  C10_DEVICE int32_t operator()(int32_t n) const {
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier_) >> 32);
    return static_cast<int32_t>((high + static_cast<uint32_t>(n)) >> shift_);
  }

 private:
  uint32_t multiplier_, shift_ = 0;
};

// Runs a kernel on the device's current stream.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int32_t device,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "expected at most 2^31 - 1 blocks, got ", blocks);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  kernel<<<static_cast<uint32_t>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename Index, typename Body>
__global__ void __launch_bounds__(kThreads) for_each_index_kernel(int64_t count, const __grid_constant__ Body body) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < count) body(static_cast<Index>(index));
}

// Runs body(index) for 0 <= index < count, a thread each.
template <typename Index, typename Body>
void for_each_index(int64_t count, int32_t device, const Body& body) {
  launch(for_each_index_kernel<Index, Body>, (count + kThreads - 1) / kThreads, kThreads, device, count, body);
}

}  // namespace paper_layers
