// Exact k-nearest neighbours on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <atomic>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>

#include "common/accumulator.h"
#include "common/huge_pages.h"
#include "knn/problem.h"

#define PAPER_LAYERS_KERNEL "knn/cpu_kernel.isa.h"
#include "common/for_each_isa.h"

namespace paper_layers {
namespace {

std::tuple<Tensor, Tensor> knn(const Tensor& query, const Tensor& points, std::optional<Tensor> query_ptr,
                               std::optional<Tensor> points_ptr, int64_t k, int64_t dilation, bool inner,
                               bool include_self, std::optional<Tensor> positions) {
  check_knn(query, points, query_ptr, points_ptr, k, dilation, positions);
  const ScalarType dtype = accumulation_dtype(query.scalar_type());
  const Tensor q = torch::stable::contiguous(torch::stable::to(query, dtype));
  const Tensor p = same_data(points, query) ? q : torch::stable::contiguous(torch::stable::to(points, dtype));
  std::vector<int64_t> shape(query.sizes().begin(), query.sizes().end());
  shape.back() = k;
  Tensor index = torch::stable::new_empty(q, shape, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(q, shape, dtype);
  // After the results, which are refused where there is no memory for one of each cloud.
  const KnnProblem problem =
      knn_problem(query, points, query_ptr, points_ptr, k, dilation, inner, include_self, positions);
  if (index.numel() == 0) return {index, distance};
  use_huge_pages(index);
  use_huge_pages(distance);
  THO_DISPATCH_V2(dtype, "knn", AT_WRAP([&] {
                    PAPER_LAYERS_DISPATCH(knn(problem, q.const_data_ptr<scalar_t>(), p.const_data_ptr<scalar_t>(),
                                              index.mutable_data_ptr<int64_t>(),
                                              distance.mutable_data_ptr<scalar_t>()));
                  }),
                  ScalarType::Float, ScalarType::Double);
  return {index, distance};
}

std::tuple<Tensor, Tensor> knn_backward(const Tensor& grad, const Tensor& query, const Tensor& points,
                                        const Tensor& index, bool inner) {
  check_knn_backward(grad, query, points, index);
  const ScalarType dtype = accumulation_dtype(query.scalar_type());
  const auto dense = [&](const Tensor& tensor) { return torch::stable::contiguous(torch::stable::to(tensor, dtype)); };
  const Tensor g = dense(grad), q = dense(query), p = dense(points), i = torch::stable::contiguous(index);
  Tensor grad_query = torch::stable::empty_like(q), grad_points = torch::stable::empty_like(p);
  const int64_t channels = query.size(query.dim() - 1);
  const NeighborTable table = neighbor_table(i, query, points);
  if (i.numel() == 0 || channels == 0 || table.points == 0) {
    check_index(table.index, i.numel(), table.limit());
    return {torch::stable::to(torch::stable::zero_(grad_query), query.scalar_type()),
            torch::stable::to(torch::stable::zero_(grad_points), query.scalar_type())};
  }
  THO_DISPATCH_V2(dtype, "knn_backward", AT_WRAP([&] {
                    PAPER_LAYERS_DISPATCH(knn_backward(table, channels, inner, g.const_data_ptr<scalar_t>(),
                                                       q.const_data_ptr<scalar_t>(), p.const_data_ptr<scalar_t>(),
                                                       grad_query.mutable_data_ptr<scalar_t>(),
                                                       grad_points.mutable_data_ptr<scalar_t>()));
                  }),
                  ScalarType::Float, ScalarType::Double);
  return {torch::stable::to(grad_query, query.scalar_type()), torch::stable::to(grad_points, query.scalar_type())};
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("knn", TORCH_BOX(&paper_layers::knn));
  m.impl("knn_backward", TORCH_BOX(&paper_layers::knn_backward));
}
