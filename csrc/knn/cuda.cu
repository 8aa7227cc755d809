// Exact k-nearest neighbours on the GPU.
//
// In up to three channels large clouds are searched by a tree, all else by a matrix product that is filtered as it is
// computed. Either way float64 distances decide. Nothing is read back to the host: starts of ragged clouds are data.
#include "common/reverse_table.cuh"

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "knn/cuda_backward.cuh"
#include "knn/cuda_panels.cuh"
#include "knn/cuda_tree.cuh"
#include "knn/problem.h"

namespace paper_layers {
namespace {

// One search: contiguous float32 or float64 rows.
template <typename T>
struct Search {
  const Tensor &query, &points;
  CloudRows query_rows, point_rows;
  Wanted<T> wanted;
  bool same;  // the queries are the points

  int32_t device() const { return query.get_device_index(); }
  int64_t channels() const { return query.size(query.dim() - 1); }
  Coordinates<T> coordinates(const Tensor& rows) const { return {rows.const_data_ptr<T>(), channels()}; }
  // Points of a cloud, at most.
  int64_t most_points() const { return point_rows.starts == nullptr ? point_rows.each : point_rows.rows; }

  // Memory to compute in.
  Tensor scratch(int64_t count, ScalarType dtype) const { return new_empty(query, {count}, dtype); }
  int64_t processors() const {
    int count = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device()));
    return count;
  }
};

// Memory for lists of candidates, unless a single block needs more.
constexpr int64_t kListBytes = int64_t(1) << 29;

struct PackedRows {
  Tensor values, squares, lengths;

  Panels panels() const {
    return {values.mutable_data_ptr<float>(), squares.mutable_data_ptr<double>(), lengths.mutable_data_ptr<float>()};
  }
};

template <typename T>
PackedRows pack(const Search<T>& search, const CloudRows& rows, const Tensor& tensor, const Frame& frame) {
  const int64_t panels = rows.blocks(kPanel);
  const PackedRows result{search.scratch(panels * kPanel * search.channels(), ScalarType::Float),
                          search.scratch(panels * kPanel, ScalarType::Double),
                          search.scratch(panels, ScalarType::Float)};
  launch(pack_kernel<T>, panels, kPackThreads, search.device(), rows, search.coordinates(tensor), frame,
         result.panels());
  return result;
}

template <typename T>
void search_panels(const Search<T>& search) {
  const CloudRows &query_rows = search.query_rows, &point_rows = search.point_rows;
  const int64_t channels = search.channels(), clouds = point_rows.clouds;
  const int32_t device = search.device();
  const Tensor centers = search.scratch(clouds * channels, ScalarType::Double);
  const Tensor largest = new_zeros(search.query, {clouds}, ScalarType::Long);
  const auto bits = static_cast<uint64_t*>(largest.mutable_data_ptr());
  const Frame frame{search.wanted.inner ? nullptr : centers.const_data_ptr<double>(), bits};
  if (!search.wanted.inner) {
    launch(find_center_kernel<T>, (clouds * channels * kWarp + kPackThreads - 1) / kPackThreads, kPackThreads, device,
           point_rows, search.coordinates(search.points), centers.mutable_data_ptr<double>());
  }
  const auto look_at = [&](const CloudRows& rows, const Tensor& tensor) {
    launch(find_largest_kernel<T>, rows.blocks(kPanel), kPackThreads, device, rows, search.coordinates(tensor), frame,
           reinterpret_cast<unsigned long long*>(bits));
  };
  look_at(point_rows, search.points);
  if (!search.same) look_at(query_rows, search.query);
  const PackedRows points = pack(search, point_rows, search.points, frame);
  const PackedRows queries = search.same ? points : pack(search, query_rows, search.query, frame);

  const int64_t most = search.most_points(), panels = (most + kPanel - 1) / kPanel;
  const int64_t capacity = std::min(2 * search.wanted.among(most) + 2 * kPanel, panels * kPanel);
  STD_TORCH_CHECK(capacity <= std::numeric_limits<int32_t>::max(), "k and dilation: expected fewer than 2^30 positions");
  // As many blocks as run at once take the queries in turn, each with lists of its own.
  const int64_t block_bytes = std::max<int64_t>(1, capacity) * (8 * kQueries + 12 * kSearchWarps);
  const int64_t blocks = std::min({query_rows.blocks(kPanel) * (kPanel / kQueries), kSearchBlocks * search.processors(),
                                   std::max<int64_t>(1, kListBytes / block_bytes)});
  const Tensor candidates = search.scratch(blocks * kQueries * capacity, ScalarType::Long);
  const Tensor distances = search.scratch(blocks * kSearchWarps * capacity, ScalarType::Double);
  const Tensor indices = search.scratch(blocks * kSearchWarps * capacity, ScalarType::Int);
  launch(search_panels_kernel<T>, blocks, kSearchThreads, device,
         PanelSearch<T>{query_rows, point_rows, search.coordinates(search.query), search.coordinates(search.points),
                        queries.panels(), points.panels(), frame, search.wanted, capacity,
                        static_cast<Candidate*>(candidates.mutable_data_ptr()), distances.mutable_data_ptr<double>(),
                        indices.mutable_data_ptr<int32_t>()});
}

// The number of bits of the numbers below count.
int bits_below(int64_t count) {
  int bits = 0;
  while ((int64_t(1) << bits) < count) ++bits;
  return bits;
}

// The rows of points along the curve.
template <typename T>
Tensor order_along_curve(const Search<T>& search) {
  const CloudRows& rows = search.point_rows;
  const int32_t device = search.device();
  const Coordinates<T> points = search.coordinates(search.points);
  const int dimensions = static_cast<int>(search.channels()), left = 63 - bits_below(rows.clouds);
  const int rank_bits = bits_below(search.most_points()), bits = std::min(rank_bits, left / dimensions);
  const Tensor codes = search.scratch(rows.rows, ScalarType::Long), keys = search.scratch(rows.rows, ScalarType::Long);
  int64_t* code = codes.mutable_data_ptr<int64_t>();
  for (int d = 0; d < dimensions; ++d) {
    for_each_index<int64_t>(
        rows.rows, device, WriteCoordinateKeys<T>{rows, points, CloudKey{left}, d, keys.mutable_data_ptr<int64_t>()});
    const Sorted result = sorted(keys);
    for_each_index<int64_t>(rows.rows, device,
                            AddRanks{rows, CloudKey{left}, result.values.const_data_ptr<int64_t>(),
                                     result.order.const_data_ptr<int64_t>(), d, dimensions, bits, rank_bits - bits,
                                     code});
  }
  for_each_index<int64_t>(rows.rows, device, WriteCurveKeys{rows, CloudKey{bits * dimensions}, code});
  return sorted(codes).order;
}

template <typename T>
void search_tree(const Search<T>& search) {
  const CloudRows& rows = search.point_rows;
  const int32_t device = search.device();
  const Tensor order = order_along_curve(search);
  Tree<T> tree{rows, 0, 0, {}, order.const_data_ptr<int64_t>(), nullptr, nullptr, nullptr};
  do {
    tree.level_starts[tree.levels] = tree.nodes;
    tree.nodes += rows.blocks(Tree<T>::width(tree.levels++));
  } while (Tree<T>::width(tree.levels) < search.most_points());
  const ScalarType dtype = search.points.scalar_type();
  const Tensor coordinates = search.scratch(kDimensions * rows.rows, dtype);
  const Tensor boxes = search.scratch(2 * kDimensions * tree.nodes, dtype);
  const Tensor first_indices = search.scratch(tree.nodes, ScalarType::Int);
  tree.coordinates = coordinates.mutable_data_ptr<T>();
  tree.boxes = boxes.mutable_data_ptr<T>();
  tree.first_indices = first_indices.mutable_data_ptr<int32_t>();
  for_each_index<int64_t>(rows.rows, device, OrderPoints<T>{tree, search.coordinates(search.points)});
  for (int level = 0; level < tree.levels; ++level) {
    const int64_t nodes = rows.blocks(Tree<T>::width(level));
    launch(build_level_kernel<T>, (nodes + kTreeWarps - 1) / kTreeWarps, kTreeThreads, device, tree, level);
  }

  const int64_t wanted = search.wanted.among(search.most_points());
  const int64_t capacity = wanted + std::max<int64_t>(2 * kWarp, wanted / 2);
  const int64_t blocks = std::min({(search.query_rows.rows + kTreeWarps - 1) / kTreeWarps,
                                   kTreeBlocks * search.processors(),
                                   std::max<int64_t>(1, kListBytes / (12 * kTreeWarps * capacity))});
  const Tensor distances = search.scratch(blocks * kTreeWarps * capacity, ScalarType::Double);
  const Tensor indices = search.scratch(blocks * kTreeWarps * capacity, ScalarType::Int);
  launch(search_tree_kernel<T>, blocks, kTreeThreads, device,
         TreeSearch<T>{tree, search.query_rows, search.coordinates(search.query), search.same ? tree.order : nullptr,
                       search.wanted, capacity, distances.mutable_data_ptr<double>(),
                       indices.mutable_data_ptr<int32_t>()});
}

// From so many points in a cloud, on average, sorting them pays.
constexpr int64_t kTreePoints = 32768;

template <typename T>
void search_neighbors(const Search<T>& search) {
  const int64_t channels = search.channels(), points = search.point_rows.rows / search.point_rows.clouds;
  if (1 <= channels && channels <= kDimensions && points >= kTreePoints && !search.wanted.inner) {
    search_tree(search);
  } else {
    search_panels(search);
  }
}

// No neighbours, for queries outside all clouds.
template <typename T>
struct WriteNobody {
  int64_t* index;
  T* distance;

  C10_DEVICE void operator()(int64_t i) const {
    index[i] = -1;
    distance[i] = static_cast<T>(INFINITY);
  }
};

// The starts of the clouds, or nothing for clouds of equal sizes. The host does not know the starts' values.
CloudRows cloud_rows(const char* name, const Tensor& rows, const MaybeTensor& starts) {
  if (!starts.has_value()) return {nullptr, rows.size(0), rows.size(1), checked_product({rows.size(0), rows.size(1)})};
  STD_TORCH_CHECK(starts->scalar_type() == ScalarType::Long && starts->dim() == 1 && starts->numel() > 0, name,
                  ": expected int64 of shape (B + 1,), got ", starts->scalar_type(), " of shape ",
                  to_string(starts->sizes()));
  check_same_device(name, *starts, "query", rows);
  return {starts->const_data_ptr<int64_t>(), starts->numel() - 1, 0, rows.size(0)};
}

std::tuple<Tensor, Tensor> knn(const Tensor& any_query, const Tensor& any_points, MaybeTensor query_ptr,
                               MaybeTensor points_ptr, int64_t k, int64_t dilation, bool inner,
                               bool include_self, MaybeTensor positions) {
  check_knn(any_query, any_points, query_ptr, points_ptr, k, dilation, positions);
  const int32_t device = any_query.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const ScalarType dtype = accumulation_dtype(any_query.scalar_type());
  const bool same_rows = same_data(any_query, any_points);
  const Tensor query = to_contiguous(to_dtype(any_query, dtype));
  const Tensor points = same_rows ? query : to_contiguous(to_dtype(any_points, dtype));
  for (MaybeTensor* tensor : {&query_ptr, &points_ptr, &positions}) make_contiguous(*tensor);
  const CloudRows query_rows = cloud_rows("query_ptr", query, query_ptr);
  const CloudRows point_rows = cloud_rows("points_ptr", points, points_ptr);
  STD_TORCH_CHECK(query_rows.clouds == point_rows.clouds, "points_ptr: expected as many clouds as query_ptr has, ",
                  query_rows.clouds, ", got ", point_rows.clouds);
  STD_TORCH_CHECK(include_self || query_rows.rows == point_rows.rows,
                  "include_self: expected true where the queries are not the points");
  const int64_t most_points = point_rows.starts == nullptr ? point_rows.each : point_rows.rows;
  STD_TORCH_CHECK(most_points <= std::numeric_limits<int32_t>::max(), "points: expected fewer than 2^31, got ",
                  most_points);

  std::vector<int64_t> shape(query.sizes().begin(), query.sizes().end());
  shape.back() = k;
  const Tensor index = new_empty(query, shape, ScalarType::Long), distance = new_empty(query, shape);
  if (index.numel() == 0) return {index, distance};
  dispatch_accumulator(dtype, [&](auto element) {
    using T = decltype(element);
    const Wanted<T> wanted{k,
                           dilation,
                           positions.has_value() ? positions->const_data_ptr<int64_t>() : nullptr,
                           inner,
                           include_self,
                           index.mutable_data_ptr<int64_t>(),
                           distance.mutable_data_ptr<T>()};
    if (query_rows.starts != nullptr) {
      for_each_index<int64_t>(index.numel(), device, WriteNobody<T>{wanted.index, wanted.distance});
    }
    if (query_rows.rows == 0 || query_rows.clouds == 0) return;
    const bool same = same_rows && (!query_ptr.has_value() || same_data(*query_ptr, *points_ptr));
    search_neighbors(Search<T>{query, points, query_rows, point_rows, wanted, same});
  });
  return {index, distance};
}

std::tuple<Tensor, Tensor> knn_backward(Tensor grad, Tensor query, Tensor points, Tensor index, bool inner) {
  check_knn_backward(grad, query, points, index);
  const int32_t device = query.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  grad = to_dtype(grad, accumulation_dtype(query.scalar_type()));
  make_contiguous(grad, query, points, index);
  const Tensor grad_query = empty_like(query), grad_points = empty_like(points);
  if (index.numel() == 0 || query.numel() == 0 || points.numel() == 0) {
    return {torch::stable::fill_(grad_query, 0), torch::stable::fill_(grad_points, 0)};
  }
  const int64_t channels = query.size(query.dim() - 1);
  const NeighborTable table = neighbor_table(index, query, points);
  const ReverseTable reverse = reverse_table(points, index.numel(), table.points, RowOfNeighbor{table});
  dispatch(query.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t largest = std::max({query.numel(), points.numel(), index.numel()});
    with_rows<T>(largest, channels, {query, points, grad_query, grad_points}, [&](auto rows) {
      using R = decltype(rows);
      using Index = typename R::Index;
      constexpr int V = R::V;
      const A* g = grad.const_data_ptr<A>();
      const QueryGradient<T, R> to_query{
          rows, table, inner, g, packs<T, V>(query), packs<T, V>(points), mutable_packs<T, V>(grad_query)};
      for_each_index<Index>(query.numel() / V, device, to_query);
      const PointGradient<T, R> to_points{rows,
                                          Divider<Index>(std::max<int64_t>(table.k, 1)),
                                          reverse.edge_data(),
                                          reverse.start_data(),
                                          inner,
                                          g,
                                          packs<T, V>(query),
                                          packs<T, V>(points),
                                          mutable_packs<T, V>(grad_points)};
      for_each_index<Index>(points.numel() / V, device, to_points);
    });
  });
  return {grad_query, grad_points};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CUDA, m) {
  m.impl("knn", TORCH_BOX(&knn));
  m.impl("knn_backward", TORCH_BOX(&knn_backward));
}

}  // namespace paper_layers
