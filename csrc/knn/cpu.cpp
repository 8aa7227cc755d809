// Exact k-nearest neighbours on the CPU.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>

#include "common/huge_pages.h"
#include "common/team.h"
#include "knn/problem.h"

#define PAPER_LAYERS_KERNEL "knn/cpu_kernel.isa.h"
#include "common/for_each_isa.h"

namespace paper_layers {
namespace {

std::tuple<Tensor, Tensor> knn(const Tensor& query, const Tensor& points, MaybeTensor query_ptr,
                               MaybeTensor points_ptr, int64_t k, int64_t dilation, bool inner,
                               bool include_self, MaybeTensor positions) {
  check_knn(query, points, query_ptr, points_ptr, k, dilation, positions);
  const ScalarType dtype = accumulation_dtype(query.scalar_type());
  const Tensor q = to_contiguous(to_dtype(query, dtype));
  const Tensor p = same_data(points, query) ? q : to_contiguous(to_dtype(points, dtype));
  std::vector<int64_t> shape(query.sizes().begin(), query.sizes().end());
  shape.back() = k;
  Tensor index = new_empty(q, shape, ScalarType::Long), distance = new_empty(q, shape);
  // After the results, which are refused where there is no memory for one of each cloud.
  const KnnProblem problem =
      knn_problem(query, points, query_ptr, points_ptr, k, dilation, inner, include_self, positions);
  if (index.numel() == 0) return {index, distance};
  use_huge_pages(index);
  use_huge_pages(distance);
  dispatch_accumulator(dtype, [&](auto element) {
    using A = decltype(element);
    PAPER_LAYERS_DISPATCH(knn(problem, q.const_data_ptr<A>(), p.const_data_ptr<A>(),
                              index.mutable_data_ptr<int64_t>(), distance.mutable_data_ptr<A>()));
  });
  return {index, distance};
}

std::tuple<Tensor, Tensor> knn_backward(const Tensor& grad, const Tensor& query, const Tensor& points,
                                        const Tensor& index, bool inner) {
  check_knn_backward(grad, query, points, index);
  const ScalarType dtype = accumulation_dtype(query.scalar_type());
  const Tensor g = to_contiguous(to_dtype(grad, dtype)), q = to_contiguous(to_dtype(query, dtype)),
               p = to_contiguous(to_dtype(points, dtype)), i = to_contiguous(index);
  Tensor grad_query = empty_like(q), grad_points = empty_like(p);
  const int64_t channels = query.size(query.dim() - 1);
  const NeighborTable table = neighbor_table(i, query, points);
  if (i.numel() == 0 || channels == 0 || table.points == 0) {
    check_index(table.index, i.numel(), table.limit());
    return {to_dtype(zero_(grad_query), query.scalar_type()), to_dtype(zero_(grad_points), query.scalar_type())};
  }
  dispatch_accumulator(dtype, [&](auto element) {
    using A = decltype(element);
    PAPER_LAYERS_DISPATCH(knn_backward(table, channels, inner, g.const_data_ptr<A>(), q.const_data_ptr<A>(),
                                       p.const_data_ptr<A>(), grad_query.mutable_data_ptr<A>(),
                                       grad_points.mutable_data_ptr<A>()));
  });
  return {to_dtype(grad_query, query.scalar_type()), to_dtype(grad_points, query.scalar_type())};
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("knn", TORCH_BOX(&paper_layers::knn));
  m.impl("knn_backward", TORCH_BOX(&paper_layers::knn_backward));
}
