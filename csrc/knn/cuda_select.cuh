// A warp's work on the candidates of one query: exact distances, their order, and the neighbours.
// Every lane calls these functions with the same arguments.
#pragma once

#include <cstdint>

#include "common/cuda_utils.cuh"

namespace paper_layers {
namespace {

constexpr int32_t kNobody = 0x7fffffff;  // after all indices

C10_DEVICE inline int lane_of_thread() { return threadIdx.x % kWarp; }

// The number of lower lanes in the set.
C10_DEVICE inline int lower_lanes(unsigned set, int lane) { return __popc(set & ((1u << lane) - 1)); }

struct Found {
  double distance;
  int32_t index;

  C10_DEVICE bool before(const Found& other) const {
    return distance < other.distance || (distance == other.distance && index < other.index);
  }
};

// The coordinates of a query or point.
template <typename T>
struct Coordinates {
  const T* rows;
  int64_t channels;

  C10_DEVICE const T* row(int64_t i) const { return rows + i * channels; }
};

// Rounded by itself, not fused into a sum: points that are equally far must stay so, whatever the order of channels.
C10_DEVICE inline double product(double a, double b) { return __dmul_rn(a, b); }

// The number of lanes that share an exact distance.
constexpr int kTeam = 4;

// In float64, by differences: decides which neighbour is nearer. The order of the sum is the reference's: the
// channels beyond a multiple of four, then the lanes' sums.
template <typename T>
C10_DEVICE double exact_distance(const T* x, const T* y, int64_t channels, bool inner) {
  const int lane = lane_of_thread() % kTeam, first = lane_of_thread() - lane;
  const int64_t whole = channels / kTeam * kTeam;
  const auto term = [&](int64_t c) {
    const double a = x[c], b = y[c], difference = a - b;
    return inner ? product(a, b) : product(difference, difference);
  };
  double sum = 0, total = 0;
#pragma unroll 4
  for (int64_t c = lane; c < whole; c += kTeam) sum += term(c);
  const double rest = whole + lane < channels ? term(whole + lane) : 0;
#pragma unroll
  for (int i = 0; i < kTeam; ++i) total += __shfl_sync(kAllLanes, rest, first + i);
#pragma unroll
  for (int i = 0; i < kTeam; ++i) total += __shfl_sync(kAllLanes, sum, first + i);
  return inner ? -total : total;
}

// A list of found points, apart so that lanes read next to each other.
struct FoundList {
  double* distances;
  int32_t* indices;

  C10_DEVICE Found at(int64_t i) const { return {distances[i], indices[i]}; }
  C10_DEVICE void set(int64_t i, const Found& found) const {
    distances[i] = found.distance;
    indices[i] = found.index;
  }

  // Batcher's bitonic sort. Every comparison puts the smaller one first, so places after the last one, as if of
  // something infinite, are never touched and the count may be any.
  C10_DEVICE void sort(int count) const {
    __syncwarp();
    for (int64_t half = 1; half < count; half *= 2) {
      compare(count, half, 2 * half - 1);  // with the mirror image
      for (int64_t step = half / 2; step > 0; step /= 2) compare(count, step, step);
    }
  }

 private:
  // Each i whose bit `step` is not set with i ^ other.
  C10_DEVICE void compare(int count, int64_t step, int64_t other) const {
    for (int64_t pair = lane_of_thread();; pair += kWarp) {
      const int64_t i = 2 * (pair & ~(step - 1)) + (pair & (step - 1)), j = i ^ other;
      if (i >= count) break;
      if (j >= count) continue;
      const Found a = at(i), b = at(j);
      if (!b.before(a)) continue;
      set(i, b);
      set(j, a);
    }
    __syncwarp();
  }
};

// A list in shared memory where the entries fit, else in global memory.
constexpr int kFewFound = 128;

struct WarpLists {
  FoundList few, many;

  C10_DEVICE FoundList of(int64_t count) const { return count <= kFewFound ? few : many; }
};

// The options of a search, and its output.
template <typename A>
struct Wanted {
  int64_t k, dilation;
  const int64_t* listed;  // The wanted positions, or null for every dilation-th one
  bool inner, include_self;
  int64_t* index;
  A* distance;

  // Nearest points that hold all the wanted positions, and one more where the point itself is then left out.
  C10_HOST_DEVICE int64_t among(int64_t points) const {
    const int64_t needed = (listed ? k * dilation : (k - 1) * dilation + 1) + (include_self ? 0 : 1);
    return needed < points ? needed : points;
  }

  // The neighbours of a query, given in order the nearest points of a superset of its candidates. Indices
  // start from `offset`; `self` is the query's own.
  C10_DEVICE void write(int64_t query, int64_t self, int64_t offset, const FoundList& found, int count) const {
    const int lane = lane_of_thread();
    int64_t own_rank = count;
    if (!include_self) {
      for (int i = lane; i - lane < count; i += kWarp) {
        const unsigned own = __ballot_sync(kAllLanes, i < count && found.indices[i] == self);
        if (own != 0) own_rank = i - lane + __ffs(static_cast<int>(own)) - 1;
      }
    }
    for (int64_t r = lane; r < k; r += kWarp) {
      const int64_t rank = listed ? listed[r] : r * dilation;
      const int64_t place = rank < own_rank ? rank : rank < count ? rank + 1 : count;
      const bool there = 0 <= place && place < count;
      index[query * k + r] = there ? found.indices[place] + offset : -1;
      distance[query * k + r] = there ? static_cast<A>(found.distances[place]) : static_cast<A>(INFINITY);
    }
    __syncwarp();
  }
};

}  // namespace
}  // namespace paper_layers
