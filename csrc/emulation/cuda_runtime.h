// CUDA for a C++ compiler: what csrc/*/cuda.cu uses of its runtime and its language, for CPU tensors. A block runs at a
// time; its threads are fibers that scheduler.cpp switches where they meet, in an order that is drawn.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

// All of torch that the kernels include, before the macros below change what it means.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/Exception.h>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulation {

struct Place {
  const char* file;
  int line;
};

extern dim3 thread, block, threads, blocks;  // of the thread that runs

// Runs the kernel, and throws what was wrong with it: an assertion, or threads that wait for others in vain.
void launch(const std::function<void()>& kernel, uint32_t blocks, int threads);
[[noreturn]] void fail(const char* what, Place place);
void meet_block(Place place);
// The values of the lanes of the thread's warp, all of which have come here.
const uint64_t* meet_warp(unsigned mask, uint64_t value, Place place);

template <typename To, typename From>
To bits_as(From from) {
  To to{};
  std::memcpy(&to, &from, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return to;
}

struct NoGuard {
  explicit NoGuard(int32_t) {}
};

}  // namespace emulation

namespace torch::stable::accelerator {
using emulation::NoGuard;
}

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
// Overwritten before each block, as library.cmake has the linker place it: what a block has not written is not there.
#define __shared__ static
#define threadIdx ::emulation::thread
#define blockIdx ::emulation::block
#define blockDim ::emulation::threads
#define gridDim ::emulation::blocks
#define EMULATION_PLACE ::emulation::Place place = {__builtin_FILE(), __builtin_LINE()}

// The kernels of the CPU's tensors, which have no device, no stream and no errors of CUDA.
#define CUDA CPU
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream(device, stream) ((void)(device), *(stream) = nullptr, AOTI_TORCH_SUCCESS)
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) (call)
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_KERNEL_LAUNCH_CHECK() void()
#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) \
  if (!(condition)) ::emulation::fail("device-side assert: " #condition, {__FILE__, __LINE__})

using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
// Few, so that blocks which take their work in turn have several turns.
inline void cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { *value = 2; }

inline void __syncthreads(EMULATION_PLACE) { emulation::meet_block(place); }
inline void __syncwarp(unsigned mask = ~0u, EMULATION_PLACE) { emulation::meet_warp(mask, 0, place); }
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_PLACE) {
  const uint64_t* lanes = emulation::meet_warp(mask, predicate != 0, place);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(lanes[lane]) << lane;
  return result;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, EMULATION_PLACE) {
  return emulation::bits_as<T>(emulation::meet_warp(mask, emulation::bits_as<uint64_t>(value), place)[lane & 31]);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, EMULATION_PLACE) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x) ^ bits, place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, EMULATION_PLACE) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, static_cast<int>(lane < delta ? lane : lane - delta), place);
}

template <typename T>
T atomicAdd(T* to, T value) {
  const T old = *to;
  *to += value;
  return old;
}
template <typename T>
T atomicMax(T* to, T value) {
  const T old = *to;
  *to = old < value ? value : old;
  return old;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __float_as_int(float x) { return emulation::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return emulation::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return emulation::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation::bits_as<double>(x); }
// Not to be contracted to a fused multiply-add, as other products are on a GPU.
inline double __dmul_rn(double a, double b) {
  volatile double product = a * b;
  return product;
}
