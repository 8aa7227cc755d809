// The argument checks of split_batch_norm and its steps, for the CPU and the CUDA kernels, and the layout they see.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "common/tensors.h"

namespace paper_layers {

struct SplitBatchNormProblem {
  int64_t channels, pixels;
  std::vector<int64_t> starts;  // The first image of each split, and the end.
  bool transposed;              // Tensors are (N, P, C) in memory, not (N, C, P).

  int64_t splits() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t images() const { return starts.back(); }
  int64_t elements() const { return images() * channels * pixels; }
  int64_t count(int64_t split) const { return (starts[split + 1] - starts[split]) * pixels; }
};

// Elements in the order of channels_last: torch's rule, by which the stride of a side of 1 does not matter.
inline bool is_transposed(const Tensor& tensor) {
  return !tensor.is_contiguous() && torch::stable::transpose(tensor, 1, 2).is_contiguous();
}

inline SplitBatchNormProblem split_batch_norm_problem(const Tensor& input, const std::vector<int64_t>& split_sizes) {
  check_floating("input", input);
  STD_TORCH_CHECK(input.dim() == 3, "input: expected shape (N, C, P), got ", to_string(input.sizes()));
  SplitBatchNormProblem problem{input.size(1), input.size(2), {0}, is_transposed(input)};
  for (const int64_t size : split_sizes) {
    STD_TORCH_CHECK(0 <= size && size <= input.size(0) - problem.images(), "split_sizes: expected sizes that sum to ",
                    input.size(0), ", got ", to_string(split_sizes));
    problem.starts.push_back(problem.images() + size);
  }
  STD_TORCH_CHECK(problem.images() == input.size(0), "split_sizes: expected sizes that sum to ", input.size(0),
                  ", got ", to_string(split_sizes));
  return problem;
}

// Parameters and statistics of the splits.
inline void check_values(const char* name, const Tensor& values, const Tensor& input,
                         const SplitBatchNormProblem& problem) {
  const std::array<int64_t, 2> shape = {problem.splits(), problem.channels};
  const ScalarType dtype = accumulation_dtype(input.scalar_type());
  STD_TORCH_CHECK(values.scalar_type() == dtype && equal(values.sizes(), shape), name, ": expected ", dtype,
                  " of shape ", to_string(shape), ", got ", values.scalar_type(), " of shape ",
                  to_string(values.sizes()));
  check_same_device(name, values, "input", input);
}
inline void check_values(const char* name, const MaybeTensor& values, const Tensor& input,
                         const SplitBatchNormProblem& problem) {
  if (values) check_values(name, *values, input, problem);
}

inline void check_grad(const Tensor& grad, const Tensor& input) {
  check_shape("grad", grad, input.sizes());
  check_same_dtype_and_device("grad", grad, "input", input);
}

// The tensor's elements in the problem's order; the strides of the result don't tell it.
inline Tensor in_order(const Tensor& tensor, bool transposed) {
  return to_contiguous(transposed ? torch::stable::transpose(tensor, 1, 2) : tensor);
}

// A tensor like the input, in the problem's order, which is the input's where it is transposed. No view: a view
// that a custom Function returns must not be changed in place, as an activation does.
inline Tensor new_like(const Tensor& input, const SplitBatchNormProblem& problem) {
  return problem.transposed ? empty_like(input) : new_empty(input, input.sizes());
}

inline Tensor new_values(const Tensor& input, const SplitBatchNormProblem& problem) {
  return new_empty(input, {problem.splits(), problem.channels}, accumulation_dtype(input.scalar_type()));
}

// Parameters or statistics as the kernels read them.
template <typename A>
struct Values {
  MaybeTensor values;
  explicit Values(const MaybeTensor& any) : values(any) { make_contiguous(values); }
  const A* data() const { return values ? values->template const_data_ptr<A>() : nullptr; }
};

}  // namespace paper_layers
