// Running statistics of several norms, moved towards new ones on the GPU: a block for each norm.
#pragma once

#include "common/cuda_utils.cuh"

#include <algorithm>

#include "common/running_statistics.h"

namespace paper_layers {
namespace {

constexpr int kNorms = 16;  // in one launch

struct Norms {
  RunningStatistics norms[kNorms];
};

template <typename A, typename T>
C10_DEVICE void move_at(void* running, int64_t at, A value, double factor, double share) {
  T& place = static_cast<T*>(running)[at];
  const double old = static_cast<double>(place);
  place = static_cast<T>(old + share * (static_cast<double>(value) * factor - old));
}

template <typename A>
C10_DEVICE void move_at(void* running, ScalarType dtype, int64_t at, A value, double factor, double share) {
  switch (dtype) {
    case ScalarType::Double: return move_at<A, double>(running, at, value, factor, share);
    case ScalarType::Half: return move_at<A, torch::headeronly::Half>(running, at, value, factor, share);
    case ScalarType::BFloat16: return move_at<A, torch::headeronly::BFloat16>(running, at, value, factor, share);
    default: return move_at<A, float>(running, at, value, factor, share);
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads)
    move_kernel(const __grid_constant__ Norms norms, int64_t channels, const A* mean, const A* var, bool average,
                double momentum) {
  const RunningStatistics norm = norms.norms[blockIdx.x];
  const double count = static_cast<double>(norm.counted ? *norm.counted : norm.count);
  const int64_t batches = norm.batches ? static_cast<int64_t>(static_cast<uint64_t>(*norm.batches) + 1) : 0;
  __syncthreads();  // All have read it.
  if (norm.batches && threadIdx.x == 0) *norm.batches = batches;
  if (!(count > 1)) return;
  // The average of all batches does not move where nobody counts them, as in torch.
  const double share = !average ? momentum : norm.batches ? 1.0 / static_cast<double>(batches) : 0.0;
  const int64_t first = blockIdx.x * channels;
  for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
    move_at(norm.mean, norm.mean_dtype, c * norm.mean_stride, mean[first + c], 1.0, share);
    move_at(norm.var, norm.var_dtype, c * norm.var_stride, var[first + c], count / (count - 1), share);
  }
}

inline void move_running_statistics(std::vector<Tensor> running_mean, std::vector<Tensor> running_var,
                                    std::vector<Tensor> batches, Tensor mean, Tensor var, std::vector<int64_t> counts,
                                    MaybeTensor counted, std::optional<double> momentum) {
  const int32_t device = mean.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  make_contiguous(mean, var);
  make_contiguous(counted);
  const auto problem = running_statistics_problem(running_mean, running_var, batches, mean, var, counts, counted);
  if (problem.channels == 0 && batches.empty()) return;
  dispatch_accumulator(mean.scalar_type(), [&](auto element) {
    using A = decltype(element);
    const int64_t count = static_cast<int64_t>(problem.norms.size());
    for (int64_t first = 0; first < count; first += kNorms) {
      const int64_t some = std::min<int64_t>(kNorms, count - first);
      Norms norms{};
      std::copy_n(problem.norms.begin() + first, some, norms.norms);
      launch(move_kernel<A>, some, kThreads, device, norms, problem.channels,
             mean.const_data_ptr<A>() + first * problem.channels, var.const_data_ptr<A>() + first * problem.channels,
             !momentum.has_value(), momentum.value_or(0));
    }
  });
}

}  // namespace
}  // namespace paper_layers
