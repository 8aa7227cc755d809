// The CUDA kernels of local importance-based pooling.
//
// Forward: a thread a window. Backward: a thread a window for its largest logit and its normaliser, then a thread
// an element, which gathers from the windows that hold it: no atomics, so results do not vary from run to run. For half
// types the windows' averages are computed again before: the error of a rounded output adds up over a window, while the
// gradients of its logits cancel.

#include "common/cuda_tensors.cuh"

#include <initializer_list>
#include <limits>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "lip_pool2d/cuda_kernel.cuh"
#include "lip_pool2d/problem.h"

namespace paper_layers {
namespace {

bool fits_int32(const LipPool2dProblem& problem) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  const int64_t planes = problem.images * problem.channels;
  const auto largest_position = [](const Side& side) { return side.length + side.padding + side.kernel; };
  return planes * problem.height.length * problem.width.length <= limit &&
         planes * problem.height.outputs * problem.width.outputs <= limit &&
         largest_position(problem.height) <= limit && largest_position(problem.width) <= limit;
}

// Calls function(shape): 32-bit indices where they reach, packs where channels lie together.
template <typename T, bool Shared, typename Function>
void with_shape(const LipPool2dProblem& problem, std::initializer_list<Tensor> tensors, Function function) {
  constexpr int V = 16 / sizeof(Accumulator<T>);
  if (!fits_int32(problem)) {
    function(Shape<int64_t, 1, Shared>(problem));
  } else if (problem.depth() % V == 0 && aligned(tensors, V * sizeof(T))) {
    function(Shape<int32_t, V, Shared>(problem));
  } else {
    function(Shape<int32_t, 1, Shared>(problem));
  }
}

template <template <int, typename, typename> class Body, typename T, typename S, typename... Pointers>
void for_each_window(const LipPool2dProblem& problem, int32_t device, const S& shape, Pointers... pointers) {
  const Sizes sizes = output_sizes(problem);
  const int64_t count = sizes[0] * sizes[1] * sizes[2] * sizes[3] / S::V;
  // A window of 3 has at least one pixel, its nearest one for the others (2 on an empty image may have none).
  if (problem.height.kernel == 3 && problem.width.kernel == 3) {
    for_each_index<typename S::Index>(count, device, Body<3, T, S>{shape, pointers...});
  } else {
    for_each_index<typename S::Index>(count, device, Body<0, T, S>{shape, pointers...});
  }
}

template <typename T, bool Shared>
void forward(const LipPool2dProblem& problem, const Tensor& input, const Tensor& logit, const Tensor& output) {
  with_shape<T, Shared>(problem, {input, logit}, [&](auto shape) {
    using S = decltype(shape);
    for_each_window<Rounded, T>(problem, input.get_device_index(), shape, packs<T, S::V>(input), packs<T, S::L>(logit),
                                mutable_packs<T, S::V>(output));
  });
}

// The output before it is rounded.
template <typename T, bool Shared>
Tensor averages(const LipPool2dProblem& problem, const Tensor& input, const Tensor& logit, const Tensor& output) {
  using A = Accumulator<T>;
  if constexpr (std::is_same_v<T, A>) {
    return output;
  } else {
    const Tensor average = new_empty(input, output_sizes(problem), ScalarType::Float, problem);
    with_shape<T, Shared>(problem, {input, logit}, [&](auto shape) {
      using S = decltype(shape);
      for_each_window<Average, T>(problem, input.get_device_index(), shape, packs<T, S::V>(input),
                                  packs<T, S::L>(logit), mutable_packs<A, S::V>(average));
    });
    return average;
  }
}

template <typename T>
void statistics(const LipPool2dProblem& maps, const Tensor& logit, const Tensor& largest, const Tensor& inverse_sum) {
  using A = Accumulator<T>;
  with_shape<T, false>(maps, {logit}, [&](auto shape) {
    using S = decltype(shape);
    for_each_window<Statistics, T>(maps, logit.get_device_index(), shape, packs<T, S::L>(logit),
                                   mutable_packs<A, S::L>(largest), mutable_packs<A, S::L>(inverse_sum));
  });
}

template <typename T, bool Shared>
void backward(const LipPool2dProblem& problem, const Tensor& grad, const Tensor& input, const Tensor& logit,
              const Tensor& output, const Tensor& largest, const Tensor& inverse_sum, const Tensor& grad_input,
              const Tensor& grad_logit) {
  using A = Accumulator<T>;
  const Tensor average = averages<T, Shared>(problem, input, logit, output);
  with_shape<T, Shared>(problem, {grad, input, logit, average}, [&](auto shape) {
    using S = decltype(shape);
    using Body = Backward<T, S>;
    constexpr int V = S::V, L = S::L;
    const Body body{shape,
                    packs<T, V>(grad),
                    packs<T, V>(input),
                    packs<T, L>(logit),
                    packs<A, V>(average),
                    packs<A, L>(largest),
                    packs<A, L>(inverse_sum),
                    mutable_packs<T, V>(grad_input),
                    mutable_packs<typename Body::G, V>(grad_logit)};
    for_each_index<typename S::Index>(input.numel() / V, input.get_device_index(), body);
  });
}

Tensor lip_pool2d(const Tensor& any_input, const Tensor& any_logit, const std::vector<int64_t>& kernel_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, bool ceil_mode) {
  const LipPool2dProblem problem =
      lip_pool2d_problem(any_input, any_logit, kernel_size, stride, padding, ceil_mode);
  const torch::stable::accelerator::DeviceGuard guard(any_input.get_device_index());
  const Tensor input = to_contiguous(any_input, memory_format(problem));
  const Tensor logit = to_contiguous(any_logit, memory_format(problem));
  const Tensor output = new_empty(input, output_sizes(problem), input.scalar_type(), problem);
  if (output.numel() == 0) return output;
  dispatch(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    (problem.shared ? forward<T, true> : forward<T, false>)(problem, input, logit, output);
  });
  return output;
}

std::tuple<Tensor, Tensor> lip_pool2d_backward(
    const Tensor& any_grad, const Tensor& any_input, const Tensor& any_logit, const Tensor& any_output,
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    bool ceil_mode) {
  const LipPool2dProblem problem =
      lip_pool2d_problem(any_input, any_logit, kernel_size, stride, padding, ceil_mode);
  check_like_output("grad", any_grad, any_input, problem);
  check_like_output("output", any_output, any_input, problem);
  const torch::stable::accelerator::DeviceGuard guard(any_input.get_device_index());
  const MemoryFormat format = memory_format(problem);
  const Tensor grad = to_contiguous(any_grad, format);
  const Tensor input = to_contiguous(any_input, format);
  const Tensor logit = to_contiguous(any_logit, format);
  const Tensor output = to_contiguous(any_output, format);

  const ScalarType dtype = input.scalar_type(), accumulator = accumulation_dtype(dtype);
  // Logits as images of their own: the windows' weights depend on nothing else.
  LipPool2dProblem maps = problem;
  maps.channels = logit.size(1);
  maps.shared = false;
  const Tensor largest = new_empty(logit, output_sizes(maps), accumulator, maps);
  const Tensor inverse_sum = new_empty(logit, output_sizes(maps), accumulator, maps);
  const Sizes sizes = {input.size(0), input.size(1), input.size(2), input.size(3)};
  const Tensor grad_input = new_empty(input, sizes, dtype, problem);
  const Tensor grad_logit = new_empty(input, sizes, problem.shared ? accumulator : dtype, problem);
  if (input.numel() > 0) {
    dispatch(dtype, [&](auto element) {
      using T = decltype(element);
      statistics<T>(maps, logit, largest, inverse_sum);
      (problem.shared ? backward<T, true> : backward<T, false>)(
          problem, grad, input, logit, output, largest, inverse_sum, grad_input, grad_logit);
    });
  }
  if (!problem.shared) return {grad_input, grad_logit};
  return {grad_input, to_contiguous(to_dtype(sum_over(grad_logit, 1, true), dtype), format)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CUDA, m) {
  m.impl("lip_pool2d", TORCH_BOX(&lip_pool2d));
  m.impl("lip_pool2d_backward", TORCH_BOX(&lip_pool2d_backward));
}

}  // namespace paper_layers
