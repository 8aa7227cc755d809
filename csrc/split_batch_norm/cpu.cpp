// Batch normalisation of the parts of a batch on the CPU.
#include "common/cpu_running_statistics.h"
#include "common/range.h"
#include "common/scratch.h"
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

// Parameters of all splits, (S, C), in the dtype of statistics.
template <typename A>
class Table {
 public:
  Table(const Parameters& parameters, const SplitBatchNormProblem& problem)
      : values_(parameters.rows.size() * problem.channels) {
    dispatch(parameters.dtype, [&](auto element) {
      A* to = values_.data();
      for (const void* row : parameters.rows) {
        to = std::copy_n(static_cast<const decltype(element)*>(row), problem.channels, to);
      }
    });
  }
  const A* data() const { return values_.empty() ? nullptr : values_.data(); }

 private:
  Scratch<A> values_;
};

template <typename A>
void write(const Scratch<A>& values, const Gradients& to, int64_t channels) {
  dispatch(to.dtype, [&](auto element) {
    const A* from = values.data();
    for (void* row : to.rows) {
      std::copy_n(from, channels, static_cast<decltype(element)*>(row));
      from += channels;
    }
  });
}

// Statistics are computed, or given; without `output`, nothing more than them.
void run_forward(const Tensor& input, const SplitBatchNormProblem& problem, std::vector<Tensor> weight,
                 std::vector<Tensor> bias, const Tensor& mean, const Tensor& var, const MaybeTensor& output,
                 bool has_statistics, double eps) {
  const Parameters weights("weight", std::move(weight), input, problem);
  const Parameters biases("bias", std::move(bias), input, problem);
  if (mean.numel() == 0) return;
  const Tensor x = in_order(input, problem.transposed);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Table<A> w(weights, problem), b(biases, problem);
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

// Sums are computed, or their means are given: a pair of tables. Without `grad_input`, nothing more than sums.
void run_backward(const Tensor& grad, const Tensor& input, const SplitBatchNormProblem& problem,
                  const Parameters& weights, const Tensor& any_mean, const Tensor& any_var, const Gradients& products,
                  const Gradients& sums, const Tensor* means, const MaybeTensor& grad_input, double eps) {
  check_grad(grad, input);
  check_values("mean", any_mean, input, problem);
  check_values("var", any_var, input, problem);
  if (any_mean.numel() == 0) return;
  const Tensor mean = to_contiguous(any_mean), var = to_contiguous(any_var);
  const Tensor g = in_order(grad, problem.transposed), x = in_order(input, problem.transposed);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Table<A> w(weights, problem);
    Scratch<A> tables[2];
    for (int i = 0; i < 2; ++i) {
      const int64_t values = mean.numel();
      if (means) tables[i].assign(means[i].const_data_ptr<A>(), means[i].const_data_ptr<A>() + values);
      else tables[i].resize(values);
    }
    const SplitBackward<T> arguments{problem,
                                     g.const_data_ptr<T>(),
                                     x.const_data_ptr<T>(),
                                     w.data(),
                                     mean.const_data_ptr<A>(),
                                     var.const_data_ptr<A>(),
                                     tables[0].data(),
                                     tables[1].data(),
                                     grad_input && grad_input->numel() > 0 ? grad_input->mutable_data_ptr<T>() : nullptr,
                                     means != nullptr,
                                     static_cast<A>(eps)};
    PAPER_LAYERS_DISPATCH(backward(arguments));
    write(tables[0], products, problem.channels);
    write(tables[1], sums, problem.channels);
  });
}

}  // namespace
}  // namespace paper_layers

#include "split_batch_norm/ops.h"

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) { paper_layers::register_ops(m); }
