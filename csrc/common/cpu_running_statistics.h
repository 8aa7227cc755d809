// Running statistics of several norms, moved towards new ones on the CPU.
#pragma once

#include "common/running_statistics.h"

namespace paper_layers {

template <typename A, typename T>
void move_row(T* running, int64_t stride, const A* values, int64_t channels, double factor, double share) {
  for (int64_t c = 0; c < channels; ++c) {
    const double old = static_cast<double>(running[c * stride]);
    running[c * stride] = static_cast<T>(old + share * (static_cast<double>(values[c]) * factor - old));
  }
}

template <typename A>
void move_row(void* running, ScalarType dtype, int64_t stride, const A* values, int64_t channels, double factor,
              double share) {
  dispatch(dtype, [&](auto element) {
    move_row(static_cast<decltype(element)*>(running), stride, values, channels, factor, share);
  });
}

inline void move_running_statistics(std::vector<Tensor> running_mean, std::vector<Tensor> running_var,
                                    std::vector<Tensor> batches, Tensor mean, Tensor var, std::vector<int64_t> counts,
                                    MaybeTensor counted, std::optional<double> momentum) {
  make_contiguous(mean, var);
  make_contiguous(counted);
  const auto problem = running_statistics_problem(running_mean, running_var, batches, mean, var, counts, counted);
  if (problem.norms.empty()) return;
  dispatch_accumulator(mean.scalar_type(), [&](auto element) {
    using A = decltype(element);
    const A *means = mean.const_data_ptr<A>(), *vars = var.const_data_ptr<A>();
    for (const RunningStatistics& norm : problem.norms) {
      const double count = static_cast<double>(norm.counted ? *norm.counted : norm.count);
      if (norm.batches) *norm.batches = static_cast<int64_t>(static_cast<uint64_t>(*norm.batches) + 1);
      // The average of all batches does not move where nobody counts them, as in torch.
      const double share = momentum ? *momentum : norm.batches ? 1.0 / static_cast<double>(*norm.batches) : 0.0;
      if (count > 1) {
        move_row(norm.mean, norm.mean_dtype, norm.mean_stride, means, problem.channels, 1, share);
        move_row(norm.var, norm.var_dtype, norm.var_stride, vars, problem.channels, count / (count - 1), share);
      }
      means += problem.channels;
      vars += problem.channels;
    }
  });
}

}  // namespace paper_layers
