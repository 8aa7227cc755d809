// The argument checks of knn and the clouds that follow from them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <vector>

#include <torch/headeronly/macros/Macros.h>

#include "common/neighbor_table.h"
#include "common/tensors.h"

namespace paper_layers {

// Rows of queries and of points that belong together, and the row from which indices count.
struct Cloud {
  Range queries, points;
  int64_t offset;
};

struct KnnProblem {
  std::vector<Cloud> clouds;
  int64_t channels;
  int64_t k, dilation;
  bool inner;         // the negative inner product in place of the squared distance
  bool include_self;
  std::vector<int64_t> listed = {};  // The wanted positions; if empty, every dilation-th one.

  int64_t position(int64_t r) const { return listed.empty() ? r * dilation : listed[r]; }
  // The number of wanted positions among the `count` first ones.
  int64_t ranks_below(int64_t count) const {
    if (listed.empty()) return (count + dilation - 1) / dilation;
    return std::lower_bound(listed.begin(), listed.end(), count) - listed.begin();
  }
  // The number of nearest points that hold all wanted positions.
  int64_t positions() const { return position(k - 1) + 1; }
};

// The starts of the clouds: from 0 to the number of rows, never descending.
inline std::vector<int64_t> read_starts(const char* name, const Tensor& starts, const Tensor& query, int64_t rows) {
  STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Long && starts.dim() == 1 && starts.numel() > 0, name,
                  ": expected int64 of shape (B + 1,), got ", starts.scalar_type(), " of shape ",
                  to_string(starts.sizes()));
  check_same_device(name, starts, "query", query);
  const Tensor contiguous = to_contiguous(starts);
  const int64_t* data = contiguous.const_data_ptr<int64_t>();
  const std::vector<int64_t> result(data, data + starts.numel());
  STD_TORCH_CHECK(result.front() == 0 && result.back() == rows, name, ": expected numbers from 0 to ", rows, ", got ",
                  result.front(), " to ", result.back());
  const auto descent = std::is_sorted_until(result.begin(), result.end());
  STD_TORCH_CHECK(descent == result.end(), name, ": expected numbers that never descend, got ", *descent,
                  " at position ", descent - result.begin(), " after ", *(descent - 1));
  return result;
}

inline void check_points(const char* name, const Tensor& points, const Tensor& query) {
  const int64_t last = query.dim() - 1;
  STD_TORCH_CHECK(points.dim() == query.dim() && points.size(last) == query.size(last) &&
                      (last == 1 || points.size(0) == query.size(0)),
                  name, ": expected the channels and clouds of query, ", to_string(query.sizes()), ", got ",
                  to_string(points.sizes()));
  check_same_dtype_and_device(name, points, "query", query);
}

// The checks that don't read the clouds' starts.
inline void check_knn(const Tensor& query, const Tensor& points, const MaybeTensor& query_ptr,
                      const MaybeTensor& points_ptr, int64_t k, int64_t dilation,
                      const MaybeTensor& positions) {
  STD_TORCH_CHECK(query.dim() == 2 || query.dim() == 3, "query: expected shape (B, M, C) or (M, C), got ",
                  to_string(query.sizes()));
  const int64_t last = query.dim() - 1;
  check_floating("query", query);
  check_points("points", points, query);
  STD_TORCH_CHECK(query_ptr.has_value() == (last == 1) && points_ptr.has_value() == (last == 1),
                  "query_ptr and points_ptr: expected with shape (M, C), and only there");
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(1 <= k && 1 <= dilation && k <= limit / dilation,
                  "k and dilation: expected numbers from 1 with a product of at most ", limit, ", got ", k, " and ",
                  dilation);
  if (!positions.has_value()) return;
  STD_TORCH_CHECK(positions->scalar_type() == ScalarType::Long && positions->dim() == 1 && positions->size(0) == k,
                  "positions: expected int64 of shape (", k, ",), got ", positions->scalar_type(), " of shape ",
                  to_string(positions->sizes()));
  check_same_device("positions", *positions, "query", query);
}

inline KnnProblem knn_problem(const Tensor& query, const Tensor& points, const MaybeTensor& query_ptr,
                              const MaybeTensor& points_ptr, int64_t k, int64_t dilation, bool inner,
                              bool include_self, const MaybeTensor& positions) {
  check_knn(query, points, query_ptr, points_ptr, k, dilation, positions);
  const int64_t last = query.dim() - 1;
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  KnnProblem problem{{}, query.size(last), k, dilation, inner, include_self};
  if (positions.has_value()) {
    const Tensor contiguous = to_contiguous(*positions);
    problem.listed.assign(contiguous.const_data_ptr<int64_t>(), contiguous.const_data_ptr<int64_t>() + k);
    STD_TORCH_CHECK(std::adjacent_find(problem.listed.begin(), problem.listed.end(), std::greater_equal<>()) ==
                            problem.listed.end() &&
                        problem.listed.front() >= 0 && problem.listed.back() < k * dilation,
                    "positions: expected ascending numbers from 0 to ", k * dilation - 1, ", got ",
                    to_string(problem.listed));
  }
  if (last == 2) {
    const int64_t m = query.size(1), n = points.size(1), count = m > 0 ? query.size(0) : 0;
    STD_TORCH_CHECK(n <= limit, "points: expected at most ", limit, " in a cloud, got ", n);
    for (int64_t b = 0; b < count; ++b) problem.clouds.push_back({{b * m, b * m + m}, {b * n, b * n + n}, 0});
  } else {
    const auto q = read_starts("query_ptr", *query_ptr, query, query.size(0));
    const auto p = read_starts("points_ptr", *points_ptr, query, points.size(0));
    STD_TORCH_CHECK(q.size() == p.size(), "points_ptr: expected as many clouds as query_ptr has, ", q.size() - 1,
                    ", got ", p.size() - 1);
    for (size_t b = 0; b + 1 < q.size(); ++b) problem.clouds.push_back({{q[b], q[b + 1]}, {p[b], p[b + 1]}, p[b]});
  }
  for (const Cloud& cloud : problem.clouds) {
    STD_TORCH_CHECK(cloud.points.size() <= limit, "points: expected at most ", limit, " in a cloud, got ",
                    cloud.points.size());
    STD_TORCH_CHECK(include_self || cloud.queries.size() == cloud.points.size(),
                    "include_self: expected true where the queries are not the points");
  }
  return problem;
}

// True if the two have the same elements in the same order; the strides of dimensions of size 1 don't matter.
inline bool same_data(const Tensor& a, const Tensor& b) {
  bool same = a.const_data_ptr() == b.const_data_ptr() && equal(a.sizes(), b.sizes());
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == 1 || a.stride(d) == b.stride(d);
  return same;
}

// The neighbours' rows among all points. Indices count within clouds of cloud_points rows, or, if it is 0, in all rows.
struct NeighborTable {
  const int64_t* index;
  int64_t queries, k, points;
  int64_t cloud_queries, cloud_points;

  // Indices are below this number.
  C10_HOST_DEVICE int64_t limit() const { return cloud_points > 0 ? cloud_points : points; }
  C10_HOST_DEVICE bool in_range(int64_t edge) const { return -1 <= index[edge] && index[edge] < limit(); }
  // -1 where there is no neighbour, or an index is out of range: it must not be taken for the next cloud's.
  C10_HOST_DEVICE int64_t row(int64_t edge) const {
    const int64_t own = index[edge];
    return own < 0 || own >= limit() ? -1 : own + edge / k / cloud_queries * cloud_points;
  }
};

// `index` is contiguous.
inline NeighborTable neighbor_table(const Tensor& index, const Tensor& query, const Tensor& points) {
  const int64_t last = query.dim() - 1, k = index.size(last);
  return {index.const_data_ptr<int64_t>(),
          index.numel() / std::max<int64_t>(k, 1),
          k,
          last == 2 ? checked_product({points.size(0), points.size(1)}) : points.size(0),
          std::max<int64_t>(1, query.size(last - 1)),
          last == 2 ? points.size(1) : 0};
}

inline void check_knn_backward(const Tensor& grad, const Tensor& query, const Tensor& points, const Tensor& index) {
  STD_TORCH_CHECK(query.dim() == 2 || query.dim() == 3, "query: expected shape (B, M, C) or (M, C), got ",
                  to_string(query.sizes()));
  check_floating("query", query);
  check_floating("grad", grad);
  check_points("points", points, query);
  std::vector<int64_t> shape(query.sizes().begin(), query.sizes().end());
  shape.back() = index.dim() > 0 ? index.size(index.dim() - 1) : 0;
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && equal(index.sizes(), shape),
                  "index: expected int64 of shape ", to_string(shape), ", got ", index.scalar_type(), " of shape ",
                  to_string(index.sizes()));
  check_shape("grad", grad, shape);
  check_same_device("index", index, "query", query);
  check_same_device("grad", grad, "query", query);
}

}  // namespace paper_layers
