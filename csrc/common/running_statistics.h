// Running statistics of several norms: the arguments and their checks, for the CPU and the CUDA kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "common/tensors.h"

namespace paper_layers {

// One of the norms whose statistics are moved; the new ones are rows of tables.
struct RunningStatistics {
  void *mean, *var;
  ScalarType mean_dtype, var_dtype;
  int64_t mean_stride, var_stride;
  int64_t* batches;         // or null
  const int64_t* counted;   // the number of values, if the host does not know it
  int64_t count;            // the number of values, if it does
};

struct RunningStatisticsProblem {
  int64_t channels = 0;
  std::vector<RunningStatistics> norms;
};

inline void check_running(const char* name, const Tensor& values, const Tensor& mean, int64_t channels) {
  check_floating(name, values);
  STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == channels, name, ": expected shape (", channels, "), got ",
                  to_string(values.sizes()));
  STD_TORCH_CHECK(channels < 2 || values.stride(0) != 0, name, ": expected memory for each channel, got a stride of 0");
  check_same_device(name, values, "mean", mean);
}

inline int64_t* int64_at(const char* name, const Tensor& tensor, int64_t count, const Tensor& mean) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.numel() == count, name, ": expected int64 of ",
                  count, " elements, got ", tensor.scalar_type(), " of shape ", to_string(tensor.sizes()));
  check_same_device(name, tensor, "mean", mean);
  return tensor.mutable_data_ptr<int64_t>();
}

// `mean`, `var` and `counted` are contiguous.
inline RunningStatisticsProblem running_statistics_problem(const std::vector<Tensor>& running_mean,
                                                           const std::vector<Tensor>& running_var,
                                                           const std::vector<Tensor>& batches, const Tensor& mean,
                                                           const Tensor& var, const std::vector<int64_t>& counts,
                                                           const MaybeTensor& counted) {
  RunningStatisticsProblem problem;
  const size_t norms = running_mean.size();
  STD_TORCH_CHECK(running_var.size() == norms && (batches.empty() || batches.size() == norms) &&
                      counts.size() == (counted ? 0 : norms),
                  "running_var, batches, counts: expected ", norms, " of them, got ", running_var.size(), ", ",
                  batches.size(), ", ", counts.size());
  if (norms == 0) return problem;
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Float || mean.scalar_type() == ScalarType::Double,
                  "mean: expected float32 or float64, got ", mean.scalar_type());
  check_same_dtype_and_device("var", var, "mean", mean);
  problem.channels = running_mean[0].numel();
  const int64_t values = checked_product({static_cast<int64_t>(norms), problem.channels});
  STD_TORCH_CHECK(mean.numel() == values && var.numel() == values, "mean, var: expected ", values, " elements, got ",
                  mean.numel(), ", ", var.numel());
  const int64_t* const on_device =
      counted ? int64_at("counted", *counted, static_cast<int64_t>(norms), mean) : nullptr;
  for (size_t i = 0; i < norms; ++i) {
    check_running("running_mean", running_mean[i], mean, problem.channels);
    check_running("running_var", running_var[i], mean, problem.channels);
    problem.norms.push_back({running_mean[i].mutable_data_ptr(), running_var[i].mutable_data_ptr(),
                             running_mean[i].scalar_type(), running_var[i].scalar_type(), running_mean[i].stride(0),
                             running_var[i].stride(0),
                             batches.empty() ? nullptr : int64_at("batches", batches[i], 1, mean),
                             on_device ? on_device + i : nullptr, on_device ? 0 : counts[i]});
  }
  return problem;
}

}  // namespace paper_layers
