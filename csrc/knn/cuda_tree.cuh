// Up to three channels, many points: a tree over the points along a Morton curve, walked by a warp for each query.
//
// The curve runs through the ranks of the coordinates, not through the coordinates, so that clusters and far outliers
// do not matter. Every 32 points in its order are a leaf, every 32 nodes a node above, so the tree has no pointers,
// and a warp looks at all children of a node at once. All distances are exact: distances to boxes are computed as
// distances to points, and rounding is monotone, so that no point is nearer than its box.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/reverse_table.cuh"
#include "knn/cuda_clouds.cuh"
#include "knn/cuda_select.cuh"

namespace paper_layers {
namespace {

constexpr int kDimensions = 3;
constexpr int kLevels = 6;  // enough for 2^31 points: a level has 32 times fewer nodes than the one below
constexpr int kTreeThreads = 256;
constexpr int kTreeWarps = kTreeThreads / kWarp;
constexpr int kTreeBlocks = 3;  // that a processor holds at once

// Sorting keys: the cloud above, `bits` bits of something else below.
struct CloudKey {
  int bits;

  C10_DEVICE int64_t of(int64_t cloud, uint64_t low) const { return cloud << bits | static_cast<int64_t>(low); }
  C10_DEVICE int64_t cloud(int64_t key) const { return key >> bits; }
};

// A coordinate as an integer in the order of the numbers; NaN and infinities are somewhere.
template <typename T>
struct WriteCoordinateKeys {
  CloudRows rows;
  Coordinates<T> points;
  CloudKey key;
  int dimension;
  int64_t* keys;

  C10_DEVICE void operator()(int64_t i) const {
    const double x = points.row(i)[dimension];
    const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x)), sign = uint64_t(1) << 63;
    const uint64_t ordered = (bits & sign) != 0 ? ~bits : bits | sign;
    keys[i] = key.of(rows.cloud_of_row(i), ordered >> (64 - key.bits));
  }
};

// Spreads a coordinate's ranks, which are equal for equal coordinates, over every so many bits of the code.
struct AddRanks {
  CloudRows rows;
  CloudKey key;
  const int64_t* keys;  // in order
  const int64_t* order;
  int dimension, dimensions, bits, dropped;  // the lowest bits are dropped where there is no room
  int64_t* codes;

  C10_DEVICE void operator()(int64_t i) const {
    const int64_t start = rows.start(key.cloud(keys[i])), first = count_less(keys, i, keys[i]);
    const int64_t rank = first > start ? (first - start) >> dropped : 0;
    int64_t code = dimension == 0 ? 0 : codes[order[i]];
    for (int bit = 0; bit < bits; ++bit) code |= (rank >> bit & 1) << (bit * dimensions + dimension);
    codes[order[i]] = code;
  }
};

struct WriteCurveKeys {
  CloudRows rows;
  CloudKey key;
  int64_t* codes;

  C10_DEVICE void operator()(int64_t i) const {
    codes[i] = key.of(rows.cloud_of_row(i), static_cast<uint64_t>(codes[i]));
  }
};

// Points in the order of the curve, and boxes of 32, 1024 ... of them.
template <typename T>
struct Tree {
  CloudRows rows;
  int levels;
  int64_t nodes;                 // of all levels
  int64_t level_starts[kLevels];  // a level's first node
  const int64_t* order;          // the row of each place
  T* coordinates;                // (kDimensions, places), 0 where there are fewer dimensions
  T* boxes;                      // (2, kDimensions, nodes): low and high
  int32_t* first_indices;        // the least index in each node

  C10_HOST_DEVICE static int64_t width(int level) { return int64_t(1) << (5 * (level + 1)); }
  C10_DEVICE int64_t first_node(int level, int64_t cloud) const {
    return level_starts[level] + rows.first_block(cloud, width(level));
  }
  C10_DEVICE T& coordinate(int d, int64_t place) const { return coordinates[d * rows.rows + place]; }
  C10_DEVICE T& low(int d, int64_t node) const { return boxes[d * nodes + node]; }
  C10_DEVICE T& high(int d, int64_t node) const { return boxes[(kDimensions + d) * nodes + node]; }
};

template <typename T>
struct OrderPoints {
  Tree<T> tree;
  Coordinates<T> points;

  C10_DEVICE void operator()(int64_t place) const {
    const T* row = points.row(tree.order[place]);
    for (int d = 0; d < kDimensions; ++d) tree.coordinate(d, place) = d < points.channels ? row[d] : T(0);
  }
};

// The boxes of a level, a warp a node, from the points or from the level below.
template <typename T>
__global__ void __launch_bounds__(kTreeThreads) build_level_kernel(const __grid_constant__ Tree<T> tree, int level) {
  const int64_t node = (static_cast<int64_t>(blockIdx.x) * kTreeThreads + threadIdx.x) / kWarp;
  const int lane = lane_of_thread();
  const int64_t width = Tree<T>::width(level);
  if (node >= tree.rows.blocks(width)) return;  // whole warps
  const Block block = block_of(tree.rows, node, width);
  const int64_t below = width / kWarp, children = (block.rows.count + below - 1) / below;
  const bool there = lane < children;
  const int64_t child = level == 0 ? block.rows.begin + lane
                                   : tree.first_node(level - 1, block.cloud) + block.first / below + lane;
  int32_t index = kNobody;
  if (there) {
    index = level == 0 ? static_cast<int32_t>(tree.order[child] - tree.rows.start(block.cloud))
                       : tree.first_indices[child];
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const int32_t other = __shfl_xor_sync(kAllLanes, index, step);
    index = other < index ? other : index;
  }
  const int64_t to = tree.level_starts[level] + node;
  if (lane == 0) tree.first_indices[to] = index;
  for (int d = 0; d < kDimensions; ++d) {
    T low = static_cast<T>(INFINITY), high = static_cast<T>(-INFINITY);
    if (there) {
      // A NaN, which is in no order, leaves them as they are.
      const T least = level == 0 ? tree.coordinate(d, child) : tree.low(d, child);
      const T most = level == 0 ? least : tree.high(d, child);
      low = least < low ? least : low;
      high = most > high ? most : high;
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const T other_low = __shfl_xor_sync(kAllLanes, low, step), other_high = __shfl_xor_sync(kAllLanes, high, step);
      low = other_low < low ? other_low : low;
      high = other_high > high ? other_high : high;
    }
    if (lane == 0) {
      tree.low(d, to) = low;
      tree.high(d, to) = high;
    }
  }
}

template <typename T>
struct TreeSearch {
  Tree<T> tree;
  CloudRows query_rows;
  Coordinates<T> query;
  const int64_t* query_order;  // queries that are near each other in turn; null: as they are
  Wanted<T> wanted;
  int64_t capacity;  // found points of a query, room for a leaf among them
  double* found_distances;  // (warps, capacity)
  int32_t* found_indices;
};

// The walk of one query, the same in all lanes.
template <typename T>
struct Walk {
  const Tree<T>& tree;
  const WarpLists& lists;
  double query[kDimensions];
  int64_t cloud;
  Span points;
  int wanted;
  int64_t capacity;
  int count = 0;
  Found limit{INFINITY, kNobody};  // what is not before it is of no use

  // The squared distance from a box, or from a point where low and high are the same.
  template <typename Low, typename High>
  C10_DEVICE double distance(Low low, High high) const {
    double total = 0;
    for (int d = 0; d < kDimensions; ++d) {
      const double below = static_cast<double>(low(d)) - query[d], above = query[d] - static_cast<double>(high(d));
      const double gap = fmax(fmax(below, above), 0.0);  // passes over NaN
      total += product(gap, gap);
    }
    return total;
  }

  // Keeps the nearest and limits what may come.
  C10_DEVICE void shrink() {
    const FoundList list = lists.of(capacity);
    list.sort(count);
    if (count < wanted) return;
    count = wanted;
    if (wanted > 0) limit = list.at(wanted - 1);
    __syncwarp();
  }

  C10_DEVICE void visit_leaf(int64_t leaf) {
    const int64_t place = points.begin + leaf * kWarp + lane_of_thread();
    Found found{INFINITY, kNobody};
    bool there = place < points.begin + points.count;
    if (there) {
      found.distance = 0;
      for (int d = 0; d < kDimensions; ++d) {
        const double difference = static_cast<double>(tree.coordinate(d, place)) - query[d];
        found.distance += product(difference, difference);
      }
      found.index = static_cast<int32_t>(tree.order[place] - points.begin);
      there = !std::isnan(found.distance) && found.before(limit);
    }
    const unsigned all = __ballot_sync(kAllLanes, there);
    if (there) lists.of(capacity).set(count + lower_lanes(all, lane_of_thread()), found);
    count += __popc(all);
    const bool unlimited = limit.index == kNobody;
    if (count > capacity - kWarp || (unlimited && count >= wanted)) shrink();
  }

  // Depth first, nearest first. When the walk comes back to a node, the child that it visited last tells which
  // children are left; lane l remembers the last child of level l.
  C10_DEVICE void run() {
    const int lane = lane_of_thread(), top = tree.levels - 1;
    int64_t parent = 0, remembered_parent = 0;
    Found last{-1, -1}, remembered{-1, -1};  // distance and lane
    for (int level = top;;) {
      const int64_t child = parent * kWarp + lane, first = tree.first_node(level, cloud);
      Found nearest{INFINITY, kNobody};
      if (child < (points.count + Tree<T>::width(level) - 1) / Tree<T>::width(level)) {
        const int64_t node = first + child;
        const Found box{distance([&](int d) { return tree.low(d, node); }, [&](int d) { return tree.high(d, node); }),
                        tree.first_indices[node]};
        const Found here{box.distance, lane};
        if (last.before(here) && box.before(limit)) nearest = here;
      }
      for (int step = kWarp / 2; step > 0; step /= 2) {
        const Found other{__shfl_xor_sync(kAllLanes, nearest.distance, step),
                          __shfl_xor_sync(kAllLanes, nearest.index, step)};
        if (other.before(nearest)) nearest = other;
      }
      if (nearest.index == kNobody) {
        if (level == top) return;
        ++level;
        parent = __shfl_sync(kAllLanes, remembered_parent, level);
        last = {__shfl_sync(kAllLanes, remembered.distance, level), __shfl_sync(kAllLanes, remembered.index, level)};
      } else if (level == 0) {
        last = nearest;
        visit_leaf(parent * kWarp + nearest.index);
      } else {
        if (lane == level) {
          remembered_parent = parent;
          remembered = nearest;
        }
        parent = parent * kWarp + nearest.index;
        last = {-1, -1};
        --level;
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kTreeThreads, kTreeBlocks)
    search_tree_kernel(const __grid_constant__ TreeSearch<T> search) {
  __shared__ double few_distances[kTreeWarps][kFewFound];
  __shared__ int32_t few_indices[kTreeWarps][kFewFound];
  const int warp = threadIdx.x / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTreeWarps + warp;
  const WarpLists lists = {
      {few_distances[warp], few_indices[warp]},
      {search.found_distances + first * search.capacity, search.found_indices + first * search.capacity}};
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kTreeWarps;
  for (int64_t i = first; i < search.query_rows.rows; i += warps) {
    const int64_t row = search.query_order == nullptr ? i : search.query_order[i];
    const int64_t cloud = search.query_rows.cloud_of_row(row);
    const Span queries = search.query_rows.span(cloud);
    const int64_t own_index = row - queries.begin;
    if (own_index < 0 || own_index >= queries.count) continue;  // starts that are not in order
    const Span points = search.tree.rows.span(cloud);
    Walk<T> walk{search.tree, lists, {}, cloud, points, static_cast<int>(search.wanted.among(points.count)),
                 search.capacity};
    bool looks = points.count > 0;
    for (int d = 0; d < kDimensions; ++d) {
      walk.query[d] = d < search.query.channels ? search.query.row(row)[d] : T(0);
      looks = looks && !std::isnan(walk.query[d]);
    }
    if (looks) walk.run();
    const FoundList list = lists.of(search.capacity);
    list.sort(walk.count);
    const int count = walk.count < walk.wanted ? walk.count : walk.wanted;
    search.wanted.write(row, own_index, search.query_rows.starts == nullptr ? 0 : points.begin, list, count);
  }
}

}  // namespace
}  // namespace paper_layers
