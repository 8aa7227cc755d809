// What the CPU kernels of split_batch_norm read and write. Values of splits and channels are (S, C).
#pragma once

#include "common/accumulator.h"
#include "split_batch_norm/problem.h"

namespace paper_layers {

template <typename T>
struct SplitForward {
  using A = Accumulator<T>;

  const SplitBatchNormProblem& problem;
  const T* input;
  const A *weight, *bias;  // or null
  A *mean, *var;
  T* output;           // null: statistics only
  bool has_statistics;  // mean and var are given
  A eps;
};

template <typename T>
struct SplitBackward {
  using A = Accumulator<T>;

  const SplitBatchNormProblem& problem;
  const T *grad, *input;
  const A *weight, *mean, *var;  // weight: or null
  A *products, *sums;  // Of grad times the normalised input, and of grad; where given, their means.
  T* grad_input;       // null: sums only
  bool has_means;
  A eps;
};

}  // namespace paper_layers
