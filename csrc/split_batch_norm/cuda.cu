// Batch normalisation of the parts of a batch on the GPU: sums of parts of each split, then their totals, merged in
// order, then a sweep over the elements. No atomics, so results do not vary from run to run.

#include "common/cuda_running_statistics.cuh"
#include "common/cuda_tensors.cuh"

#include <limits>

#include "split_batch_norm/cuda_elements.cuh"
#include "split_batch_norm/cuda_kernel.cuh"
#include "split_batch_norm/problem.h"

namespace paper_layers {
namespace {

// Calls function(elements): numbers of 32 bits where they reach, packs where runs of elements allow it.
template <typename T, bool rows, typename Function>
void with_elements(const SplitBatchNormProblem& problem, std::initializer_list<Tensor> tensors, Function function) {
  constexpr int V = 16 / sizeof(Accumulator<T>);
  const int64_t count = problem.images() * problem.channels * problem.pixels;
  // Half of what 32 bits hold, because loops count on beyond the end.
  if (std::max(count, problem.splits() * problem.channels) > std::numeric_limits<int32_t>::max() / 2) {
    function(Elements<int64_t, 1, rows>(problem));
  } else if ((rows ? problem.channels : problem.pixels) % V == 0 && aligned(tensors, 16)) {
    function(Elements<int32_t, V, rows>(problem));
  } else {
    function(Elements<int32_t, 1, rows>(problem));
  }
}

// Calls function(element, elements) with the input's dtype.
template <typename Function>
void dispatch_elements(const SplitBatchNormProblem& problem, std::initializer_list<Tensor> tensors, Function function) {
  dispatch(tensors.begin()->scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto call = [&](auto elements) { function(T{}, elements); };
    if (problem.transposed) {
      with_elements<T, true>(problem, tensors, call);
    } else {
      with_elements<T, false>(problem, tensors, call);
    }
  });
}

// Divides some splits among a block's threads, by sizes alone, so that results depend on nothing else.
template <typename E>
Grid divide(const SplitBatchNormProblem& problem, const E& elements, Splits& splits) {
  constexpr int64_t kBlocks = 2048, kParts = 256, kUnitsPerThread = 4;
  Grid grid{1, problem.channels, 0};
  if (E::rows) {
    while (grid.columns < kWarp && grid.columns < elements.run) grid.columns *= 2;
    grid.column_blocks = (elements.run + grid.columns - 1) / grid.columns;
  }
  const int64_t units_per_image = E::rows ? elements.runs : elements.run;
  int64_t most = 0;
  for (int s = 0; s < splits.count; ++s) most = std::max(most, splits.images[s + 1] - splits.images[s]);
  const int64_t wanted = kBlocks / std::max<int64_t>(1, splits.count * grid.column_blocks);
  const int64_t parts = std::min(std::max<int64_t>(wanted, 1), kParts);
  grid.length = std::max((most * units_per_image + parts - 1) / parts, kUnitsPerThread * kThreads / grid.columns);
  splits.parts[0] = 0;
  for (int s = 0; s < splits.count; ++s) {
    const int64_t units = (splits.images[s + 1] - splits.images[s]) * units_per_image;
    splits.parts[s + 1] = splits.parts[s] + (units + grid.length - 1) / grid.length;
  }
  return grid;
}

// Calls function(splits, first element, first value) for as many splits at a time as a launch takes.
template <typename Function>
void each_splits(const SplitBatchNormProblem& problem, Function function) {
  for (int64_t first = 0; first < problem.splits(); first += kSplits) {
    Splits splits{};
    splits.count = static_cast<int>(std::min<int64_t>(kSplits, problem.splits() - first));
    for (int s = 0; s <= splits.count; ++s) {
      splits.images[s] = problem.starts[first + s] - problem.starts[first];
    }
    function(splits, problem.starts[first] * problem.channels * problem.pixels, first * problem.channels);
  }
}

// Sums each split and calls finish(value, total).
template <typename Thread, typename E, typename Finish>
void reduce(const Splits& splits, const Grid& grid, const E& elements, const Tensor& like,
            const typename Thread::Source& source, const Finish& finish) {
  using Total = typename Thread::Total;
  const int64_t parts = splits.parts[splits.count], channels = elements.channels;
  const Tensor memory = new_empty(like, {parts * channels * int64_t(sizeof(Total))}, ScalarType::Byte);
  Total* totals = static_cast<Total*>(memory.mutable_data_ptr());
  const int32_t device = like.get_device_index();
  launch(totals_of_parts<Thread, E>, parts * grid.column_blocks, kThreads, device, splits, elements, grid, source,
         totals);
  launch(totals_of_splits<Total, typename Thread::Wide, Finish>,
         (splits.count * channels + kColumns - 1) / kColumns, kThreads, device, splits, channels,
         static_cast<const Total*>(totals), finish);
}

template <typename T, typename E>
Pack<T, E::V>* packs_at(T* data, int64_t element) {
  return reinterpret_cast<Pack<T, E::V>*>(data + element);
}
template <typename T, typename E>
const Pack<T, E::V>* packs_at(const T* data, int64_t element) {
  return reinterpret_cast<const Pack<T, E::V>*>(data + element);
}

// A row of a table of values, from a value on.
template <typename A>
A* values_at(const Tensor& table, int64_t row, int64_t value) {
  return table.mutable_data_ptr<A>() + row * table.size(1) + value;
}

// The rows of some splits, from the first on; none if there are none.
template <typename Pointer>
ParameterRows<Pointer> rows_at(const std::vector<Pointer>& rows, ScalarType dtype, int64_t channels, int64_t first) {
  ParameterRows<Pointer> result{};
  result.dtype = dtype;
  result.channels = channels;
  if (rows.empty()) return result;
  std::copy_n(rows.begin() + first, std::min<int64_t>(kSplits, rows.size() - first), result.rows);
  return result;
}

// Statistics are computed, or given; without `output`, nothing more than them.
void run_forward(const Tensor& any_input, const SplitBatchNormProblem& problem, std::vector<Tensor> weight,
                 std::vector<Tensor> bias, const Tensor& mean, const Tensor& var, const MaybeTensor& output,
                 bool has_statistics, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(any_input.get_device_index());
  const Parameters weights("weight", std::move(weight), any_input, problem);
  const Parameters biases("bias", std::move(bias), any_input, problem);
  const int64_t values = checked_product({problem.splits(), problem.channels});
  if (values == 0) return;
  const Tensor input = in_order(any_input, problem.transposed);
  const Tensor table = new_empty(mean, {2, values});
  const int32_t device = input.get_device_index();
  dispatch_elements(problem, {input, mean, table, output ? *output : input}, [&](auto element, auto elements) {
    using T = decltype(element);
    using E = decltype(elements);
    using A = Accumulator<T>;
    const T* x = input.const_data_ptr<T>();
    A *const means = mean.mutable_data_ptr<A>(), *const vars = var.mutable_data_ptr<A>();
    each_splits(problem, [&](Splits splits, int64_t first, int64_t value) {
      const int64_t split = value / problem.channels;
      const Grid grid = divide(problem, elements, splits);
      const Normalization<A> normalization{rows_at(weights.rows, weights.dtype, problem.channels, split),
                                           rows_at(biases.rows, biases.dtype, problem.channels, split),
                                           means + value,
                                           vars + value,
                                           static_cast<A>(eps),
                                           output ? values_at<A>(table, 0, value) : nullptr,
                                           values_at<A>(table, 1, value)};
      const auto* in = packs_at<T, E>(x, first);
      if (has_statistics) {
        for_each_index<int64_t>(splits.count * problem.channels, device, normalization);
      } else {
        const FinishMoments<T, E> finish{splits, elements, x + first, means + value, vars + value, normalization};
        reduce<ThreadMoments<T, E>>(splits, grid, elements, input, {in}, finish);
      }
      if (!output) return;
      for_each_index<typename E::Index>(
          splits.images[splits.count] * problem.channels * problem.pixels / E::V, device,
          Normalize<T, E>{splits, elements, in, means + value, normalization.scale, normalization.shift,
                          packs_at<T, E>(output->mutable_data_ptr<T>(), first)});
    });
  });
}

// Sums are computed, or their means are given: a pair of tables. Without `grad_input`, nothing more than sums.
void run_backward(const Tensor& any_grad, const Tensor& any_input, const SplitBatchNormProblem& problem,
                  const Parameters& weights, const Tensor& any_mean, const Tensor& any_var, const Gradients& products,
                  const Gradients& sums, const Tensor* given, const MaybeTensor& grad_input, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(any_input.get_device_index());
  check_grad(any_grad, any_input);
  check_values("mean", any_mean, any_input, problem);
  check_values("var", any_var, any_input, problem);
  const int64_t values = checked_product({problem.splits(), problem.channels});
  if (values == 0) return;
  const Tensor grad = in_order(any_grad, problem.transposed), input = in_order(any_input, problem.transposed);
  const Tensor mean = to_contiguous(any_mean), var = to_contiguous(any_var);
  const Tensor table = new_empty(mean, {3, values});
  const int32_t device = input.get_device_index();
  dispatch_elements(problem, {input, grad, mean, table, grad_input ? *grad_input : input}, [&](auto element, auto elements) {
    using T = decltype(element);
    using E = decltype(elements);
    using A = Accumulator<T>;
    const A *const means = mean.const_data_ptr<A>(), *const vars = var.const_data_ptr<A>();
    each_splits(problem, [&](Splits splits, int64_t first, int64_t value) {
      const int64_t split = value / problem.channels;
      const Grid grid = divide(problem, elements, splits);
      const Pullback<A> pullback{rows_at(weights.rows, weights.dtype, problem.channels, split),
                                 vars + value,
                                 given ? given[0].const_data_ptr<A>() + value : nullptr,
                                 given ? given[1].const_data_ptr<A>() + value : nullptr,
                                 static_cast<A>(eps),
                                 grad_input ? values_at<A>(table, 0, value) : nullptr,
                                 values_at<A>(table, 1, value),
                                 values_at<A>(table, 2, value)};
      const auto *g = packs_at<T, E>(grad.const_data_ptr<T>(), first),
                 *x = packs_at<T, E>(input.const_data_ptr<T>(), first);
      if (given) {
        for_each_index<int64_t>(splits.count * problem.channels, device, pullback);
      } else {
        const FinishSums<A> finish{splits,
                                   problem.channels,
                                   problem.pixels,
                                   rows_at(products.rows, products.dtype, problem.channels, split),
                                   rows_at(sums.rows, sums.dtype, problem.channels, split),
                                   pullback};
        reduce<ThreadSums<T, E>>(splits, grid, elements, input, {g, x, means + value}, finish);
      }
      if (!grad_input) return;
      for_each_index<typename E::Index>(
          splits.images[splits.count] * problem.channels * problem.pixels / E::V, device,
          GradInput<T, E>{splits, elements, g, x, means + value, pullback.of_grad, pullback.of_input, pullback.shift,
                          packs_at<T, E>(grad_input->mutable_data_ptr<T>(), first)});
    });
  });
}

}  // namespace
}  // namespace paper_layers

#include "split_batch_norm/ops.h"

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CUDA, m) { paper_layers::register_ops(m); }
