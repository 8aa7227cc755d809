// The argument checks of split_batch_norm and its steps, for the CPU and the CUDA kernels, and the layout they see.
#pragma once

#include <algorithm>
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
  bool transposed;              // Tensors are read as (N, P, C) in memory, not as (N, C, P).

  int64_t splits() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t images() const { return starts.back(); }
  int64_t elements() const { return images() * channels * pixels; }
  int64_t count(int64_t split) const { return (starts[split + 1] - starts[split]) * pixels; }
};

// Elements in the order of channels_last: torch's rule, by which the stride of a side of 1 does not matter.
inline bool has_rows(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const size_t dims = sizes.size();
  int64_t expected = 1;
  for (size_t i = 0; i < dims; ++i) {
    const size_t dim = i == 0 ? 1 : i + 1 < dims ? dims - i : 0;
    if (sizes[dim] == 1) continue;
    if (strides[dim] != expected) return false;
    if (__builtin_mul_overflow(expected, sizes[dim], &expected)) return false;  // Without elements.
  }
  return true;
}
inline bool is_transposed(const Tensor& tensor) { return !tensor.is_contiguous() && has_rows(tensor); }

inline SplitBatchNormProblem split_batch_norm_problem(const Tensor& input, const std::vector<int64_t>& split_sizes) {
  check_floating("input", input);
  const auto sizes = input.sizes();
  STD_TORCH_CHECK(sizes.size() >= 2, "input: expected shape (N, C, ...), got ", to_string(sizes));
  SplitBatchNormProblem problem{sizes[1], 1, {0}, is_transposed(input)};
  for (size_t dim = 2; dim < sizes.size(); ++dim) problem.pixels = checked_product({problem.pixels, sizes[dim]});
  problem.transposed = problem.transposed || problem.pixels == 1;  // Then the two orders are one.
  problem.starts.reserve(split_sizes.size() + 1);
  for (const int64_t size : split_sizes) {
    STD_TORCH_CHECK(0 <= size && size <= sizes[0] - problem.images(), "split_sizes: expected sizes that sum to ",
                    sizes[0], ", got ", to_string(split_sizes));
    problem.starts.push_back(problem.images() + size);
  }
  STD_TORCH_CHECK(problem.images() == sizes[0], "split_sizes: expected sizes that sum to ", sizes[0], ", got ",
                  to_string(split_sizes));
  return problem;
}

// Statistics of the splits.
inline void check_values(const char* name, const Tensor& values, const Tensor& input,
                         const SplitBatchNormProblem& problem) {
  const std::array<int64_t, 2> shape = {problem.splits(), problem.channels};
  const ScalarType dtype = accumulation_dtype(input.scalar_type());
  STD_TORCH_CHECK(values.scalar_type() == dtype && equal(values.sizes(), shape), name, ": expected ", dtype,
                  " of shape ", to_string(shape), ", got ", values.scalar_type(), " of shape ",
                  to_string(values.sizes()));
  check_same_device(name, values, "input", input);
}

// Weights or biases, one of the input's dtype or of that of statistics a split, or none: S tensors (C,), or one (S, C).
struct Parameters {
  std::vector<Tensor> tensors;     // contiguous, of one dtype
  std::vector<const void*> rows;  // One a split; empty where there are no parameters.
  ScalarType dtype;

  Parameters(const char* name, std::vector<Tensor> given, const Tensor& input, const SplitBatchNormProblem& problem)
      : tensors(std::move(given)), dtype(accumulation_dtype(input.scalar_type())) {
    if (tensors.empty()) return;
    const int64_t splits = problem.splits(), channels = problem.channels;
    const bool is_table = tensors.size() == 1 && tensors[0].dim() == 2;
    STD_TORCH_CHECK(is_table || static_cast<int64_t>(tensors.size()) == splits, name, ": expected ", splits,
                    " of them, got ", tensors.size());
    const std::array<int64_t, 2> shape = {splits, channels};
    bool is_one_dtype = true;
    for (Tensor& tensor : tensors) {
      check_shape(name, tensor, IntHeaderOnlyArrayRef(shape.data() + !is_table, 1 + is_table));
      const ScalarType own = tensor.scalar_type();
      STD_TORCH_CHECK(own == dtype || own == input.scalar_type(), name, ": expected ", dtype, " or ",
                      input.scalar_type(), ", got ", own);
      check_same_device(name, tensor, "input", input);
      is_one_dtype = is_one_dtype && own == tensors[0].scalar_type();
      make_contiguous(tensor);
    }
    if (is_one_dtype) dtype = tensors[0].scalar_type();
    else for (Tensor& tensor : tensors) tensor = to_dtype(tensor, dtype);
    rows.reserve(splits);
    for (int64_t split = 0; split < splits; ++split) {
      const auto* first = static_cast<const char*>(tensors[is_table ? 0 : split].const_data_ptr());
      rows.push_back(is_table ? first + split * channels * tensors[0].element_size() : first);
    }
  }
};

// The one tensor of parameters that the steps take, as a list.
inline std::vector<Tensor> listed(const MaybeTensor& table) {
  return table ? std::vector<Tensor>{*table} : std::vector<Tensor>{};
}

inline void check_grad(const Tensor& grad, const Tensor& input) {
  check_shape("grad", grad, input.sizes());
  check_same_dtype_and_device("grad", grad, "input", input);
}

// The tensor's elements in the problem's order; the shape and strides of the result don't tell it.
inline Tensor in_order(const Tensor& tensor, bool transposed) {
  if (!transposed) return to_contiguous(tensor);
  if (has_rows(tensor)) return tensor;
  if (tensor.dim() == 2) return to_contiguous(tensor);
  return to_contiguous(torch::stable::transpose(torch::stable::flatten(tensor, 2, -1), 1, 2));
}

// A new tensor, without a call of the dispatcher on the CPU.
inline Tensor new_strided(const Tensor& like, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides,
                          ScalarType dtype) {
  AtenTensorHandle result;
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                                  device, like.get_device_index(), &result));
  return Tensor(result);
}
inline Tensor new_contiguous(const Tensor& like, IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    if (i > 0) stride = checked_product({stride, std::max<int64_t>(sizes[i], 1)});
  }
  return new_strided(like, sizes, strides, dtype);
}

// A tensor like the input, in its order. No view: a view that a custom Function returns must not be changed in place,
// as an activation does.
inline Tensor new_like(const Tensor& input) {
  if (is_transposed(input)) return new_strided(input, input.sizes(), input.strides(), input.scalar_type());
  return new_contiguous(input, input.sizes(), input.scalar_type());
}

inline Tensor new_values(const Tensor& input, const SplitBatchNormProblem& problem) {
  return new_contiguous(input, std::array<int64_t, 2>{problem.splits(), problem.channels},
                        accumulation_dtype(input.scalar_type()));
}

// Gradients of parameters, which the kernels write.
struct Gradients {
  std::vector<Tensor> tensors;
  std::vector<void*> rows;  // One a split.
  ScalarType dtype;

  // One tensor (S, C), or S tensors (C,), or none.
  Gradients(int64_t count, bool is_table, ScalarType dtype, const Tensor& input, const SplitBatchNormProblem& problem)
      : dtype(dtype) {
    const std::array<int64_t, 2> shape = {problem.splits(), problem.channels};
    for (int64_t i = 0; i < count; ++i) {
      tensors.push_back(new_contiguous(input, IntHeaderOnlyArrayRef(shape.data() + !is_table, 1 + is_table), dtype));
    }
    for (int64_t split = 0; count > 0 && split < shape[0]; ++split) add(tensors[is_table ? 0 : split], is_table * split);
  }
  // One tensor (S, C).
  explicit Gradients(const Tensor& table) : tensors{table}, dtype(table.scalar_type()) {
    for (int64_t split = 0; split < table.size(0); ++split) add(table, split);
  }

 private:
  void add(const Tensor& tensor, int64_t row) {
    rows.push_back(static_cast<char*>(tensor.mutable_data_ptr()) + row * tensor.size(-1) * tensor.element_size());
  }
};

}  // namespace paper_layers
