// Batch normalisation of the parts of a batch on the CPU.
#include "common/range.h"
#include "split_batch_norm/problem.h"

namespace paper_layers {

// The arguments of the kernels. Parameters and statistics have shape (splits, channels).
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
  A *products, *sums;  // of grad times the normalised input, and of grad; where given, their means
  T* grad_input;       // null: sums only
  bool has_means;
  A eps;
};

}  // namespace paper_layers

#define PAPER_LAYERS_KERNEL "split_batch_norm/cpu_kernel.isa.h"
#include "common/for_each_isa.h"

namespace paper_layers {
namespace {

// The problem as the kernels take it: rows of fewer channels than a vector holds go through planes, where a copy of
// the input costs less than parts of vectors, but without pixels there are only rows.
SplitBatchNormProblem in_kernels_layout(SplitBatchNormProblem problem) {
  constexpr int64_t kVectorElements = 16;
  problem.transposed = problem.pixels == 1 || (problem.transposed && problem.channels >= kVectorElements);
  return problem;
}

// An output, which the kernels write in their layout.
Tensor new_output(const Tensor& input, const SplitBatchNormProblem& given, const SplitBatchNormProblem& kernels) {
  return new_like(input, given.pixels == 1 ? given : kernels);
}
Tensor in_given_layout(const Tensor& output, const Tensor& input, const SplitBatchNormProblem& given) {
  if (!given.transposed || is_transposed(output)) return output;
  Tensor result = empty_like(input);
  torch::stable::copy_(result, output);
  return result;
}

// Statistics are computed, or given; without `output`, nothing more than them.
void run_forward(const Tensor& input, const SplitBatchNormProblem& problem, const MaybeTensor& weight,
                 const MaybeTensor& bias, const Tensor& mean, const Tensor& var, const MaybeTensor& output,
                 bool has_statistics, double eps) {
  check_values("weight", weight, input, problem);
  check_values("bias", bias, input, problem);
  if (mean.numel() == 0) return;
  const Tensor x = in_order(input, problem.transposed);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Values<A> w(weight), b(bias);
    const SplitForward<T> arguments{problem,
                                    x.const_data_ptr<T>(),
                                    w.data(),
                                    b.data(),
                                    mean.mutable_data_ptr<A>(),
                                    var.mutable_data_ptr<A>(),
                                    output && output->numel() > 0 ? output->mutable_data_ptr<T>() : nullptr,
                                    has_statistics,
                                    static_cast<A>(eps)};
    PAPER_LAYERS_DISPATCH(forward(arguments));
  });
}

// Sums are computed, or their means are given; without `grad_input`, nothing more than them.
void run_backward(const Tensor& grad, const Tensor& input, const SplitBatchNormProblem& problem,
                  const MaybeTensor& weight, const Tensor& mean, const Tensor& var, const Tensor& products,
                  const Tensor& sums, const MaybeTensor& grad_input, bool has_means, double eps) {
  check_grad(grad, input);
  check_values("weight", weight, input, problem);
  check_values("mean", mean, input, problem);
  check_values("var", var, input, problem);
  if (mean.numel() == 0) return;
  const Tensor g = in_order(grad, problem.transposed), x = in_order(input, problem.transposed);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Values<A> w(weight), m(mean), v(var);
    const SplitBackward<T> arguments{problem,
                                     g.const_data_ptr<T>(),
                                     x.const_data_ptr<T>(),
                                     w.data(),
                                     m.data(),
                                     v.data(),
                                     products.mutable_data_ptr<A>(),
                                     sums.mutable_data_ptr<A>(),
                                     grad_input && grad_input->numel() > 0 ? grad_input->mutable_data_ptr<T>() : nullptr,
                                     has_means,
                                     static_cast<A>(eps)};
    PAPER_LAYERS_DISPATCH(backward(arguments));
  });
}

}  // namespace
}  // namespace paper_layers

#include "split_batch_norm/ops.h"

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) { paper_layers::register_ops(m); }
