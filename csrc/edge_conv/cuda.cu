// The CUDA kernels of EdgeConv's edge pass.
//
// Forward: a thread takes a pack of channels of every so many nodes; their number is fixed, and their sums are added in
// order. Backward: the same for the nodes, which find again what edge they kept; then each row of neighbour terms
// gathers from the edges that lead to it. No atomics, so results do not vary from run to run.

#include "common/reverse_table.cuh"

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "edge_conv/cuda_kernel.cuh"
#include "edge_conv/cuda_norm.cuh"
#include "edge_conv/problem.h"

namespace paper_layers {
namespace {

// The number of partial sums.
constexpr int64_t kPartials = 1 << 18;

int64_t worker_count(const EdgeConvProblem& problem) {
  const int64_t most = std::max<int64_t>(64, kPartials / std::max<int64_t>(1, problem.channels));
  return std::max<int64_t>(1, std::min(problem.nodes, most));
}

template <typename T, typename R>
Graph<T, R> graph(const R& rows, const EdgeConvProblem& problem, const Tensor& center, const Tensor& neighbor,
                  const Tensor& index, const MaybeTensor& slope, double number) {
  using A = Accumulator<T>;
  return {rows,
          NeighborRows(index.const_data_ptr<int64_t>(), problem),
          problem.nodes,
          packs<T, R::V>(center),
          packs<T, R::V>(neighbor),
          data_or_null<A>(slope),
          static_cast<A>(number)};
}

// The kept edges, and the number of edges as a scalar of double where there are statistics.
template <typename A>
std::optional<Tensor> reduce_edges(const EdgeConvProblem& problem, const Tensor& center, const Tensor& neighbor,
                                   const Tensor& index, const MaybeTensor& slope, double number, const Kept<A>& kept,
                                   const Tensor& output, const Tensor& mean, const Tensor& var) {
  const int32_t device = center.get_device_index();
  const int64_t workers = worker_count(problem);
  const bool statistics = mean.numel() > 0;
  std::optional<Tensor> count;
  dispatch(center.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<Accumulator<T>, A>) {
      with_rows<T>(workers * problem.channels, problem.channels, {center, neighbor, output}, [&](auto rows) {
        using R = decltype(rows);
        const Graph<T, R> edges = graph<T>(rows, problem, center, neighbor, index, slope, number);
        Pack<T, R::V>* const to = mutable_packs<T, R::V>(output);
        if (!statistics) {
          for_each_index<typename R::Index>(workers * rows.packs, device,
                                            EdgeForward<T, R, false>{edges, workers, kept, to, nullptr, nullptr});
          return;
        }
        const Tensor sums = new_empty(center, {workers, 2, problem.channels}, ScalarType::Double);
        const Tensor counts = new_empty(center, {workers}, ScalarType::Double);
        for_each_index<typename R::Index>(
            workers * rows.packs, device,
            EdgeForward<T, R, true>{edges, workers, kept, to, sums.mutable_data_ptr<double>(),
                                    counts.mutable_data_ptr<double>()});
        const Tensor total = sum_over(sums, 0);
        count = sum_over(counts, 0);
        for_each_index<typename R::Index>(
            rows.packs, device,
            Statistics<T, R>{edges, total.const_data_ptr<double>(), count->const_data_ptr<double>(),
                             mean.mutable_data_ptr<A>(), var.mutable_data_ptr<A>()});
      });
    }
  });
  return count;
}

// The number of edges as a scalar of double.
Tensor edge_count(const EdgeConvProblem& problem, const Tensor& index) {
  const int64_t workers = worker_count(problem);
  const Tensor counts = new_empty(index, {workers}, ScalarType::Double);
  const CountEdges count{index.const_data_ptr<int64_t>(), index.numel(), workers, counts.mutable_data_ptr<double>()};
  for_each_index<int64_t>(workers, index.get_device_index(), count);
  return sum_over(counts, 0);
}

struct TermGradients {
  Tensor center, neighbor, slope;
};

// The gradients of the terms and of the slope; `output` are the kept edges.
template <typename A>
TermGradients term_gradients(const EdgeConvProblem& problem, const Tensor& grad, const EdgeGradients<A>& gradients,
                             const Tensor& center, const Tensor& neighbor, const Tensor& index,
                             const MaybeTensor& slope, double number, const Tensor& output) {
  const int32_t device = center.get_device_index();
  const int64_t workers = worker_count(problem);
  const ScalarType wide = accumulation_dtype(center.scalar_type());
  const Tensor grad_center = empty_like(center), grad_neighbor = empty_like(neighbor);
  if (center.numel() == 0) {
    return {grad_center, torch::stable::fill_(grad_neighbor, 0), torch::stable::fill_(new_empty(center, {}, wide), 0)};
  }
  const Tensor arg = new_empty(center, {problem.nodes, problem.channels}, ScalarType::Int);
  const Tensor count = edge_count(problem, index);
  const ReverseTable reverse =
      reverse_table(center, index.numel(), problem.rows, RowOfEdge(index.const_data_ptr<int64_t>(), problem));
  std::optional<Tensor> grad_slope;
  dispatch(center.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<Accumulator<T>, A>) {
      const int64_t largest = std::max({workers * problem.channels, problem.rows * problem.channels, index.numel()});
      const std::initializer_list<Tensor> tensors = {grad, center, neighbor, output, arg, grad_center, grad_neighbor};
      with_rows<T>(largest, problem.channels, tensors, [&](auto rows) {
        using R = decltype(rows);
        constexpr int V = R::V;
        const Graph<T, R> edges = graph<T>(rows, problem, center, neighbor, index, slope, number);
        const double* const edge_number = count.const_data_ptr<double>();
        const Tensor slopes = new_empty(center, {workers * rows.packs}, ScalarType::Double);
        for_each_index<typename R::Index>(
            workers * rows.packs, device,
            EdgeBackwardCenter<T, R>{edges, gradients, edge_number, workers, packs<T, V>(grad), packs<T, V>(output),
                                     mutable_packs<T, V>(grad_center), mutable_packs<int32_t, V>(arg),
                                     slopes.mutable_data_ptr<double>()});
        for_each_index<typename R::Index>(
            problem.rows * rows.packs, device,
            EdgeBackwardNeighbor<T, R>{edges, gradients, edge_number,
                                       Divider<typename R::Index>(std::max<int64_t>(problem.k, 1)), reverse.edge_data(),
                                       reverse.start_data(), packs<T, V>(grad), packs<int32_t, V>(arg),
                                       mutable_packs<T, V>(grad_neighbor)});
        grad_slope = to_dtype(sum_over(slopes, 0), wide);
      });
    }
  });
  return {grad_center, grad_neighbor, *grad_slope};
}

std::tuple<Tensor, Tensor, Tensor> edge_conv(Tensor center, Tensor neighbor, Tensor index, MaybeTensor slope,
                                             MaybeTensor smallest, double number, bool statistics) {
  const EdgeConvProblem problem = edge_conv_problem(center, neighbor, index, slope);
  if (smallest) check_vector("smallest", *smallest, problem.channels, ScalarType::Bool, center);
  make_contiguous(smallest);
  const torch::stable::accelerator::DeviceGuard guard(center.get_device_index());
  const ScalarType wide = accumulation_dtype(center.scalar_type());
  const int64_t wanted = statistics ? problem.channels : 0;
  const Tensor output = new_empty(center, output_sizes(index, problem));
  const Tensor mean = new_empty(center, {wanted}, wide), var = new_empty(center, {wanted}, wide);
  if (output.numel() == 0) return {output, torch::stable::fill_(mean, 0), torch::stable::fill_(var, 0)};
  dispatch_accumulator(wide, [&](auto element) {
    const Kept<decltype(element)> kept{data_or_null<bool>(smallest), nullptr, false};
    reduce_edges(problem, center, neighbor, index, slope, number, kept, output, mean, var);
  });
  return {output, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> edge_conv_backward(Tensor grad, Tensor grad_mean, Tensor grad_var, Tensor center,
                                                      Tensor neighbor, Tensor index, MaybeTensor slope, Tensor output,
                                                      Tensor mean, double number) {
  const EdgeConvProblem problem = edge_conv_problem(center, neighbor, index, slope);
  check_outputs({{"grad", &grad}, {"output", &output}}, index, problem, center);
  check_statistics(grad_mean, grad_var, mean, problem, center);
  const torch::stable::accelerator::DeviceGuard guard(center.get_device_index());
  std::optional<TermGradients> found;
  dispatch_accumulator(accumulation_dtype(center.scalar_type()), [&](auto element) {
    using A = decltype(element);
    const EdgeGradients<A> gradients{mean.numel() > 0 ? mean.const_data_ptr<A>() : nullptr,
                                     grad_mean.const_data_ptr<A>(), grad_var.const_data_ptr<A>(), nullptr};
    found = term_gradients(problem, grad, gradients, center, neighbor, index, slope, number, output);
  });
  return {found->center, found->neighbor, found->slope};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> edge_conv_norm(
    Tensor center, Tensor neighbor, Tensor index, MaybeTensor slope, MaybeTensor weight, MaybeTensor bias,
    MaybeTensor mean, MaybeTensor var, double number, double eps, bool opposite) {
  const EdgeConvProblem problem = edge_conv_problem(center, neighbor, index, slope);
  check_norm(weight, bias, mean, var, problem, center);
  const int32_t device = center.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const ScalarType wide = accumulation_dtype(center.scalar_type());
  const int64_t wanted = mean ? 0 : problem.channels;
  const Tensor output = new_empty(center, output_sizes(index, problem)), extreme = empty_like(output);
  const Tensor new_mean = new_empty(center, {wanted}, wide), new_var = new_empty(center, {wanted}, wide);
  std::optional<Tensor> count;
  if (output.numel() == 0) {
    torch::stable::fill_(new_mean, 0);
    torch::stable::fill_(new_var, 0);
    return {output, extreme, new_mean, new_var, to_dtype(edge_count(problem, index), ScalarType::Long)};
  }
  dispatch(center.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Kept<A> kept{nullptr, data_or_null<A>(weight), opposite};
    count = reduce_edges(problem, center, neighbor, index, slope, number, kept, extreme, new_mean, new_var);
    const EdgeNorm<A> norm{(mean ? *mean : new_mean).const_data_ptr<A>(), (mean ? *var : new_var).const_data_ptr<A>(),
                           data_or_null<A>(weight), data_or_null<A>(bias), static_cast<A>(eps)};
    const NeighborRows neighbors(index.const_data_ptr<int64_t>(), problem);
    with_rows<T>(output.numel(), problem.channels, {extreme, output}, [&](auto rows) {
      using R = decltype(rows);
      for_each_index<typename R::Index>(
          problem.nodes * rows.packs, device,
          NormalizeEdges<T, R>{rows, neighbors, norm, packs<T, R::V>(extreme), mutable_packs<T, R::V>(output)});
    });
  });
  if (!count) count = edge_count(problem, index);
  return {output, extreme, new_mean, new_var, to_dtype(*count, ScalarType::Long)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> edge_conv_norm_backward(
    Tensor grad, Tensor center, Tensor neighbor, Tensor index, MaybeTensor slope, MaybeTensor weight, Tensor extreme,
    Tensor mean, Tensor var, double number, double eps, bool batch) {
  const EdgeConvProblem problem = edge_conv_problem(center, neighbor, index, slope);
  check_outputs({{"grad", &grad}, {"extreme", &extreme}}, index, problem, center);
  MaybeTensor means = mean, vars = var, none;
  check_norm(weight, none, means, vars, problem, center);
  const int32_t device = center.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t workers = worker_count(problem), channels = problem.channels;
  const Tensor sums = new_empty(center, {workers, 2, channels}, ScalarType::Double);
  const Tensor found = new_empty(mean, {3, channels});
  const Tensor grad_weight = new_empty(mean, {channels}), grad_bias = new_empty(mean, {channels});
  std::optional<TermGradients> terms;
  dispatch(center.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const EdgeNorm<A> norm{means->const_data_ptr<A>(), vars->const_data_ptr<A>(), data_or_null<A>(weight), nullptr,
                           static_cast<A>(eps)};
    const NeighborRows neighbors(index.const_data_ptr<int64_t>(), problem);
    with_rows<T>(workers * channels, channels, {grad, extreme}, [&](auto rows) {
      using R = decltype(rows);
      for_each_index<typename R::Index>(
          workers * rows.packs, device,
          NormSums<T, R>{rows, neighbors, norm, problem.nodes, workers, packs<T, R::V>(grad), packs<T, R::V>(extreme),
                         sums.mutable_data_ptr<double>()});
    });
    A* const parts = found.mutable_data_ptr<A>();
    const EdgeNormGradients<A> to{parts, parts + channels, parts + 2 * channels, grad_weight.mutable_data_ptr<A>(),
                                  grad_bias.mutable_data_ptr<A>()};
    const Tensor total = sum_over(sums, 0);
    for_each_index<int64_t>(channels, device, NormGradients<A>{norm, channels, total.const_data_ptr<double>(), to});
    const EdgeGradients<A> gradients{batch ? norm.mean : nullptr, to.mean, to.var, to.factor};
    terms = term_gradients(problem, grad, gradients, center, neighbor, index, slope, number, extreme);
  });
  return {terms->center, terms->neighbor, terms->slope, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CUDA, m) {
  m.impl("edge_conv", TORCH_BOX(&edge_conv));
  m.impl("edge_conv_backward", TORCH_BOX(&edge_conv_backward));
  m.impl("edge_conv_norm", TORCH_BOX(&edge_conv_norm));
  m.impl("edge_conv_norm_backward", TORCH_BOX(&edge_conv_norm_backward));
}

}  // namespace paper_layers
