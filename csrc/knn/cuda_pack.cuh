// Rows in panels for the matrix product: centred, so that nothing cancels, scaled, so that nothing overflows, rounded
// to float32, and transposed.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "knn/cuda_clouds.cuh"
#include "knn/cuda_select.cuh"

namespace paper_layers {
namespace {

constexpr int kPanel = 128;  // rows
constexpr int kPackThreads = 128;
constexpr int kTransposed = 32;  // channels at a time

// Where the rows of each cloud lie.
struct Frame {
  const double* centers;     // (clouds, channels); null: the origin
  const uint64_t* largest;  // of each cloud, the bits of the largest coordinate's distance from the centre

  C10_DEVICE double center(int64_t cloud, int64_t channels, int64_t c) const {
    return centers == nullptr ? 0 : centers[cloud * channels + c];
  }
  // A power of two that brings the coordinates below 2; 0 where squares may overflow in float64, or are infinite.
  C10_DEVICE double scale(int64_t cloud) const {
    const double size = __longlong_as_double(static_cast<long long>(largest[cloud]));
    if (size > 1e150) return 0;
    const int exponent = size > 0 ? -ilogb(size) : 0;
    return ldexp(1.0, exponent < 500 ? exponent : 500);  // its square is finite
  }
};

// Panels of rows: channel by channel, the panel's numbers.
struct Panels {
  float* values;    // (panels, channels, kPanel)
  double* squares;  // |row|^2 in the panels' coordinates, NaN for rows that are never neighbours
  float* lengths;   // the largest |row| of each panel
};

// The median of some rows of each cloud, a warp a channel: far points do not move it.
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    find_center_kernel(const __grid_constant__ CloudRows rows, Coordinates<T> points, double* centers) {
  const int64_t task = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) / kWarp;
  if (task >= rows.clouds * points.channels) return;  // whole warps
  const int64_t cloud = task / points.channels, c = task - cloud * points.channels;
  const Span span = rows.span(cloud);
  const int lane = lane_of_thread();
  const int64_t sampled = lane * ((span.count + kWarp - 1) / kWarp);
  const double x = sampled < span.count ? static_cast<double>(points.row(span.begin + sampled)[c]) : INFINITY;
  const bool finite = std::isfinite(x);
  const unsigned all = __ballot_sync(kAllLanes, finite);
  int rank = 0;
  for (int other = 0; other < kWarp; ++other) {
    const double y = __shfl_sync(kAllLanes, x, other);
    rank += (all >> other & 1) != 0 && (y < x || (y == x && other < lane)) ? 1 : 0;
  }
  if (all == 0 ? lane == 0 : finite && rank == __popc(all) / 2) centers[task] = all == 0 ? 0 : x;
}

// The largest coordinate of each cloud, a block for a panel. NaN does not count.
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    find_largest_kernel(const __grid_constant__ CloudRows rows, Coordinates<T> points, Frame frame,
                        unsigned long long* largest) {
  const Block block = block_of(rows, blockIdx.x, kPanel);
  const int lane = lane_of_thread(), warp = threadIdx.x / kWarp;
  double most = 0;
  for (int64_t i = warp; i < block.rows.count; i += kPackThreads / kWarp) {
    const T* row = points.row(block.rows.begin + i);
    for (int64_t c = lane; c < points.channels; c += kWarp) {
      const double x = fabs(static_cast<double>(row[c]) - frame.center(block.cloud, points.channels, c));
      if (x > most) most = x;
    }
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, most, step);
    most = other > most ? other : most;
  }
  // The bits of numbers that are not negative are in the order of the numbers.
  if (lane == 0 && most > 0) {
    atomicMax(largest + block.cloud, static_cast<unsigned long long>(__double_as_longlong(most)));
  }
}

// A block a panel.
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const __grid_constant__ CloudRows rows, Coordinates<T> points, Frame frame, Panels panels) {
  static_assert(kPackThreads == kPanel, "a thread a row");
  __shared__ float tile[kTransposed][kPanel + 1];
  __shared__ double longest[kPackThreads / kWarp];
  const Block block = block_of(rows, blockIdx.x, kPanel);
  if (block.rows.count == 0) return;
  const int lane = lane_of_thread(), warp = threadIdx.x / kWarp, own = threadIdx.x;
  const int64_t channels = points.channels;
  const double scale = frame.scale(block.cloud);
  float* to = panels.values + static_cast<int64_t>(blockIdx.x) * channels * kPanel;
  double square = own < block.rows.count ? 0 : NAN;
  for (int64_t first = 0; first < channels; first += kTransposed) {
    const int64_t c = first + lane;
    const double center = c < channels ? frame.center(block.cloud, channels, c) : 0;
    for (int i = warp; i < kPanel; i += kPackThreads / kWarp) {
      const bool there = c < channels && i < block.rows.count && scale > 0;
      tile[lane][i] = there ? static_cast<float>((points.row(block.rows.begin + i)[c] - center) * scale) : 0.0f;
    }
    __syncthreads();
    for (int i = 0; i < kTransposed && first + i < channels; ++i) {
      const float x = tile[i][own];
      to[(first + i) * kPanel + own] = std::isnan(x) ? 0.0f : x;
      square += static_cast<double>(x) * x;
    }
    __syncthreads();
  }
  panels.squares[static_cast<int64_t>(blockIdx.x) * kPanel + own] = square;
  double most = std::isnan(square) ? 0 : square;
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, most, step);
    most = other > most ? other : most;
  }
  if (lane == 0) longest[warp] = most;
  __syncthreads();
  if (own == 0) {
    for (int w = 1; w < kPackThreads / kWarp; ++w) most = longest[w] > most ? longest[w] : most;
    panels.lengths[blockIdx.x] = static_cast<float>(sqrt(most));
  }
}

}  // namespace
}  // namespace paper_layers
