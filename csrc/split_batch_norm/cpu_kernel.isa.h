// The passes of split_batch_norm on the CPU, compiled once for each instruction set.

// (x - center) scale + shift.
template <typename A>
struct Affine {
  A center, scale, shift;
};

// A float32 mean of 1e4 is off by 1e-3 of a deviation of 1: what its rounding leaves goes into the shift.
template <typename T>
Affine<Accumulator<T>> normalization(const SplitForward<T>& f, int64_t at, double mean) {
  using A = Accumulator<T>;
  const double scale = (f.weight ? double(f.weight[at]) : 1.0) / std::sqrt(double(f.var[at]) + double(f.eps));
  const double rest = mean - double(f.mean[at]);
  return {f.mean[at], A(scale), A((f.bias ? double(f.bias[at]) : 0.0) - rest * scale)};
}

// The input's gradient: of_grad grad + of_input (x - center) + shift.
template <typename A>
struct Pullback {
  A of_grad, of_input, center, shift;
};

template <typename T>
Pullback<Accumulator<T>> pullback(const SplitBackward<T>& b, int64_t at, double mean_product, double mean_grad) {
  using A = Accumulator<T>;
  const double invstd = 1.0 / std::sqrt(double(b.var[at]) + double(b.eps));
  const double scale = (b.weight ? double(b.weight[at]) : 1.0) * invstd;
  return {A(scale), A(-scale * invstd * mean_product), b.mean[at], A(-scale * mean_grad)};
}

#include "split_batch_norm/cpu_planar.isa.h"
#include "split_batch_norm/cpu_rows.isa.h"

template <typename T>
void forward(const SplitForward<T>& f) {
  if (f.problem.transposed) forward_rows(f);
  else forward_planes(f);
}

template <typename T>
void backward(const SplitBackward<T>& b) {
  if (b.problem.transposed) backward_rows(b);
  else backward_planes(b);
}
