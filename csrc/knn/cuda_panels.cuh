// Any number of channels: a matrix product of queries and points that is compared with what each query still needs
// while it is in registers.
//
// With coordinates from a middle of the cloud, x . y - |y|^2 / 2 orders the points of a query x as their distances do.
// It is computed in float32, in error by at most slack |y| (|x| + |y|), so what may be among the nearest is kept, and
// exact distances decide in the end; float64 rounds them, too, by some |x|^2. Where squares would overflow even in
// float64, everything is kept.
#pragma once

#include "knn/cuda_pack.cuh"

namespace paper_layers {
namespace {

constexpr int kQueries = 32;  // of a block
constexpr int kSearchThreads = 128;
constexpr int kSearchWarps = kSearchThreads / kWarp;
constexpr int kSearchBlocks = 4;  // that a processor holds at once
constexpr int kChannels = 16;  // at a time
constexpr int kBins = 256;

struct Candidate {
  float score;  // rounded
  int32_t index;
};

// Integers in the order of the numbers.
C10_DEVICE inline uint32_t ordered_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
C10_DEVICE inline float of_ordered_key(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// The k-th largest, from 1, of the keys of 0 <= i < count, by a warp, a digit of eight bits at a time; k <= count.
template <typename KeyOf>
C10_DEVICE uint32_t kth_largest(int* histogram, int count, int k, KeyOf key_of) {
  const int lane = lane_of_thread();
  uint32_t found = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int bin = lane; bin < kBins; bin += kWarp) histogram[bin] = 0;
    __syncwarp();
    for (int i = lane; i < count; i += kWarp) {
      const uint32_t key = key_of(i);
      if ((key & mask) == found) atomicAdd(&histogram[key >> shift & (kBins - 1)], 1);
    }
    __syncwarp();
    // Each lane has some bins, lane 0 the bins of the largest digits.
    constexpr int bins = kBins / kWarp;
    const int last = kBins - 1 - lane * bins;
    int own = 0;
    for (int bin = 0; bin < bins; ++bin) own += histogram[last - bin];
    int so_far = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const int lower = __shfl_up_sync(kAllLanes, so_far, step);
      if (lane >= step) so_far += lower;
    }
    const int owner = __ffs(static_cast<int>(__ballot_sync(kAllLanes, so_far >= k))) - 1;
    int digit = last, before = so_far - own;
    if (lane == owner) {
      while (before + histogram[digit] < k) before += histogram[digit--];
    }
    k -= __shfl_sync(kAllLanes, before, owner);
    found |= static_cast<uint32_t>(__shfl_sync(kAllLanes, digit, owner)) << shift;
    mask |= static_cast<uint32_t>(kBins - 1) << shift;
    __syncwarp();
  }
  return found;
}

template <typename T>
struct PanelSearch {
  CloudRows query_rows, point_rows;
  Coordinates<T> query, points;
  Panels query_panels, point_panels;
  Frame frame;
  Wanted<T> wanted;
  int64_t capacity;       // candidates of a query, room for a panel among them
  Candidate* candidates;  // (blocks, kQueries, capacity)
  double* found_distances;  // (blocks, kSearchWarps, capacity)
  int32_t* found_indices;

  // How much, in the panels' coordinates, float64 loses of distances because squares underflow.
  C10_DEVICE double underflow(double scale) const {
    return static_cast<double>(query.channels + 16) * ldexp(scale * scale, -1072);
  }
  C10_DEVICE float slack() const { return static_cast<float>(query.channels + 8) * FLT_EPSILON; }
};

// A block's data on its queries.
struct QueryState {
  double squares[kQueries];
  float lengths[kQueries], limits[kQueries];  // scores below the limit are of no use
  float margins[kQueries];                    // how far scores and distances in float64 may differ besides
  int counts[kQueries];
};

// The candidates of one query in the hands of a warp.
template <typename T>
struct Selection {
  const PanelSearch<T>& search;
  QueryState& state;
  const WarpLists& lists;
  int* histogram;
  Candidate* candidates;
  int64_t query, own_index;  // its row, and its number in the cloud
  Span points;
  int64_t first_panel;
  double scale;
  int q, wanted;

  // How far a rounded score of a panel's points may be off.
  C10_DEVICE float error(int64_t panel) const {
    const float length = search.point_panels.lengths[first_panel + panel];
    return search.slack() * length * (state.lengths[q] + (search.wanted.inner ? 0.0f : length)) +
           FLT_MIN * static_cast<float>(search.query.channels + 8) + state.margins[q];
  }

  // Keeps the candidates that may be among the nearest, and raises the limit for later ones.
  C10_DEVICE void shrink() const {
    const int count = state.counts[q], lane = lane_of_thread();
    if (scale == 0 || count < wanted) return;
    // By the least that a score may be, so that as many are surely as near as the limit.
    const float limit = of_ordered_key(kth_largest(histogram, count, wanted, [&](int i) {
      return ordered_key(candidates[i].score - error(candidates[i].index / kPanel));
    }));
    limit_to(limit);
    int kept = 0;
    for (int i = lane; i - lane < count; i += kWarp) {
      Candidate candidate = {};
      if (i < count) candidate = candidates[i];
      const bool keep = i < count && candidate.score + error(candidate.index / kPanel) >= state.limits[q];
      const unsigned keeping = __ballot_sync(kAllLanes, keep);  // all have loaded before one stores
      if (keep) candidates[kept + lower_lanes(keeping, lane)] = candidate;
      kept += __popc(keeping);
    }
    recount(kept);
  }

  // Keeps the nearest by their exact distances and indices: where too many are equally near for scores to tell.
  C10_DEVICE void shrink_exactly() const {
    const int found = rank(), kept = found < wanted ? found : wanted;
    const FoundList list = lists.of(state.counts[q]);
    for (int i = lane_of_thread(); i < kept; i += kWarp) {
      candidates[i] = {static_cast<float>(score(list.distances[i])), list.indices[i]};
    }
    const double last = kept > 0 ? list.distances[kept - 1] : 0;
    recount(kept);
    // Points come in the order of their indices: none that is yet to come is nearer than one that coincides.
    if (kept == wanted && last == 0 && !search.wanted.inner) return limit_to(INFINITY);
    if (scale == 0) return;
    // These scores come from distances, and |x|^2 from the rounded coordinates.
    const double rounding = 4 * static_cast<double>(FLT_EPSILON) + (search.query.channels + 8) * DBL_EPSILON;
    const double margin = (search.wanted.inner ? 0 : rounding * state.squares[q]) + search.underflow(scale);
    if (lane_of_thread() == 0) state.margins[q] = static_cast<float>(margin);
    if (kept == wanted) limit_to(static_cast<float>(score(last) - margin));
  }

  // Writes the neighbours, all points having been seen.
  C10_DEVICE void finish() const {
    if (state.counts[q] > wanted) shrink();
    const int found = rank();
    const int64_t cloud_begin = search.query_rows.starts == nullptr ? 0 : points.begin;
    search.wanted.write(query, own_index, cloud_begin, lists.of(state.counts[q]), found);
  }

 private:
  C10_DEVICE double score(double distance) const {
    const double scaled = distance * scale * scale;
    return search.wanted.inner ? -scaled : (state.squares[q] - scaled) / 2;
  }

  // Sorts the candidates by their exact distances; how many have one.
  C10_DEVICE int rank() const {
    const int count = state.counts[q], lane = lane_of_thread();
    const FoundList list = lists.of(count);
    int found = 0;
    for (int first = 0; first < count; first += kWarp / kTeam) {
      const int i = first + lane / kTeam;
      const int32_t index = candidates[i < count ? i : count - 1].index;
      const double distance = exact_distance(search.query.row(query), search.points.row(points.begin + index),
                                             search.query.channels, search.wanted.inner);
      const bool there = i < count && lane % kTeam == 0, has = there && !std::isnan(distance);
      if (there) list.set(i, has ? Found{distance, index} : Found{INFINITY, kNobody});
      found += __popc(__ballot_sync(kAllLanes, has));
    }
    list.sort(count);
    return found;
  }

  // By one lane, when all have read what was there.
  C10_DEVICE void recount(int count) const {
    __syncwarp();
    if (lane_of_thread() == 0) state.counts[q] = count;
    __syncwarp();
  }
  C10_DEVICE void limit_to(float limit) const {
    __syncwarp();
    if (lane_of_thread() == 0 && limit > state.limits[q]) state.limits[q] = limit;
    __syncwarp();
  }
};

// Some queries at a time, each time with all panels of their cloud's points.
template <typename T>
__global__ void __launch_bounds__(kSearchThreads, kSearchBlocks)
    search_panels_kernel(const __grid_constant__ PanelSearch<T> search) {
  // A thread computes the scores of 4 queries and 2 x 4 points.
  constexpr int R = 4, P = 4, columns = kPanel / (2 * P);
  static_assert(columns * (kQueries / R) == kSearchThreads, "a thread a tile");
  using Four = Pack<float, 4>;
  __shared__ Four point_tile[kChannels][kPanel / 4], query_tile[kChannels][kQueries / 4];
  __shared__ QueryState state;
  __shared__ int histograms[kSearchWarps][kBins];
  __shared__ double few_distances[kSearchWarps][kFewFound];
  __shared__ int32_t few_indices[kSearchWarps][kFewFound];

  const int warp = threadIdx.x / kWarp;
  const int column = threadIdx.x % columns, row = threadIdx.x / columns;
  const int64_t channels = search.query.channels, capacity = search.capacity;
  const int64_t own_list = (static_cast<int64_t>(blockIdx.x) * kSearchWarps + warp) * capacity;
  const WarpLists lists = {{few_distances[warp], few_indices[warp]},
                           {search.found_distances + own_list, search.found_indices + own_list}};
  Candidate* candidates = search.candidates + static_cast<int64_t>(blockIdx.x) * kQueries * capacity;

  constexpr int parts = kPanel / kQueries;
  const int64_t tiles = search.query_rows.blocks(kPanel) * parts;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t panel_of_queries = tile / parts;
    const int first_query = static_cast<int>(tile % parts) * kQueries;
    const Block block = block_of(search.query_rows, panel_of_queries, kPanel);
    if (first_query >= block.rows.count) continue;
    const int64_t left = block.rows.count - first_query;
    const int queries = static_cast<int>(left < kQueries ? left : kQueries);
    const Span points = search.point_rows.span(block.cloud);
    const int64_t first_panel = search.point_rows.first_block(block.cloud, kPanel);
    const int64_t panels = (points.count + kPanel - 1) / kPanel;
    const double scale = search.frame.scale(block.cloud);
    const int wanted = static_cast<int>(search.wanted.among(points.count));
    const auto selection = [&](int q) {
      return Selection<T>{search,
                          state,
                          lists,
                          histograms[warp],
                          candidates + q * capacity,
                          block.rows.begin + first_query + q,
                          block.first + first_query + q,
                          points,
                          first_panel,
                          scale,
                          q,
                          wanted};
    };

    __syncthreads();
    if (threadIdx.x < kQueries) {
      const double square = search.query_panels.squares[panel_of_queries * kPanel + first_query + threadIdx.x];
      // Rows without coordinates and rows that are not queries don't search.
      const bool looks = static_cast<int>(threadIdx.x) < queries && !std::isnan(square);
      state.squares[threadIdx.x] = square;
      state.lengths[threadIdx.x] = looks ? static_cast<float>(sqrt(square)) : 0.0f;
      state.limits[threadIdx.x] = looks ? -FLT_MAX : static_cast<float>(INFINITY);
      // The query's part in the rounding of float64: to a far query, near points may be equally far.
      const double rounding = search.wanted.inner || !looks ? 0 : (channels + 8) * DBL_EPSILON * square;
      state.margins[threadIdx.x] = static_cast<float>(rounding + search.underflow(scale));
      state.counts[threadIdx.x] = 0;
    }
    __syncthreads();

    const Four* query_values =
        reinterpret_cast<const Four*>(search.query_panels.values + panel_of_queries * channels * kPanel + first_query);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const Four* point_values =
          reinterpret_cast<const Four*>(search.point_panels.values + (first_panel + panel) * channels * kPanel);
      const double* squares = search.point_panels.squares + (first_panel + panel) * kPanel;
      float sums[R][2 * P];
      for (int p = 0; p < 2 * P; ++p) {
        const double square = squares[p / P * (kPanel / 2) + column * P + p % P];
        const float half = search.wanted.inner ? 0.0f : static_cast<float>(square / 2);
        const float start = std::isnan(square) ? static_cast<float>(-INFINITY) : -half;
        for (int r = 0; r < R; ++r) sums[r][p] = start;
      }
      for (int64_t first = 0; first < channels; first += kChannels) {
        const int depth = static_cast<int>(channels - first < kChannels ? channels - first : kChannels);
        __syncthreads();
        for (int i = threadIdx.x; i < depth * (kPanel / 4); i += kSearchThreads) {
          point_tile[i / (kPanel / 4)][i % (kPanel / 4)] = point_values[first * (kPanel / 4) + i];
        }
        for (int i = threadIdx.x; i < depth * (kQueries / 4); i += kSearchThreads) {
          const int c = i / (kQueries / 4), x = i % (kQueries / 4);
          query_tile[c][x] = query_values[(first + c) * (kPanel / 4) + x];
        }
        __syncthreads();
#pragma unroll 4
        for (int c = 0; c < depth; ++c) {
          const Four x = query_tile[c][row];
          const Four y[2] = {point_tile[c][column], point_tile[c][columns + column]};
          for (int r = 0; r < R; ++r) {
            for (int p = 0; p < 2 * P; ++p) sums[r][p] = fmaf(x[r], y[p / P][p % P], sums[r][p]);
          }
        }
      }
      for (int r = 0; r < R; ++r) {
        const int q = row * R + r;
        const float limit = state.limits[q] - selection(q).error(panel);
        for (int p = 0; p < 2 * P; ++p) {
          const int64_t index = panel * kPanel + p / P * (kPanel / 2) + column * P + p % P;
          // Starts that are not in order leave panels with other contents: no index may be trusted.
          if (sums[r][p] > limit && index < points.count) {
            candidates[q * capacity + atomicAdd(&state.counts[q], 1)] = {sums[r][p], static_cast<int32_t>(index)};
          }
        }
      }
      __syncthreads();
      for (int q = warp; q < queries && panel + 1 < panels; q += kSearchWarps) {
        const int count = state.counts[q];
        if (count < wanted || (count <= capacity - kPanel && state.limits[q] > -FLT_MAX)) continue;
        selection(q).shrink();
        if (state.counts[q] > capacity - kPanel) selection(q).shrink_exactly();
      }
      __syncthreads();
    }
    for (int q = warp; q < queries; q += kSearchWarps) selection(q).finish();
  }
}

}  // namespace
}  // namespace paper_layers
