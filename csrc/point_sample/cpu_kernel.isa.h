// The CPU kernels of point sampling, compiled once for each instruction set.

// Sums of gradients that are kept in the caches until they are complete.
constexpr int64_t kBandBytes = int64_t(512) << 10;
// NCHW: planes at once, which share the points' taps.
constexpr int64_t kPlanes = 8;
// The least work for a thread.
constexpr int64_t kGrainPoints = 256, kGrainElements = 4096;

#include "point_sample/cpu_plan.isa.h"

// Complete sums to the gradient.
template <typename T, typename A>
void write(const A* sums, int64_t count, T* to, bool streaming) {
  using V = Vec<A>;
  int64_t i = 0;
  if constexpr (std::is_same_v<T, A>) {
    if (streaming) {
      for (; i < count && reinterpret_cast<uintptr_t>(to + i) % sizeof(V) != 0; ++i) to[i] = sums[i];
      for (; i + V::size <= count; i += V::size) store_streaming(to + i, load(sums + i));
      finish_streaming();
    }
  }
  for (; i + V::size <= count; i += V::size) store(to + i, load(sums + i));
  for (; i < count; ++i) to[i] = static_cast<T>(sums[i]);
}

#include "point_sample/cpu_planar.isa.h"
#include "point_sample/cpu_channels_last.isa.h"

template <typename T>
void forward(const PointSampleProblem& problem, const Coordinates& points, const int64_t* image,
             const std::vector<const T*>& maps, T* output) {
  const Plans<Accumulator<T>> plans(problem, points, image, sizeof(T), !problem.channels_last);
  const int64_t bytes = problem.rows * problem.points * problem.channels * sizeof(T);
  if (problem.channels_last) forward_channels_last(problem, plans, maps, output, bytes > kStreamingBytes);
  else forward_planar(problem, plans, maps, output);
}

// No pixel is written by two threads, and its sum is in the order of the points.
template <typename T>
void backward_maps(const PointSampleProblem& problem, const T* grad, const Coordinates& points, const int64_t* image,
                   const std::vector<T*>& grad_maps) {
  const Plans<Accumulator<T>> plans(problem, points, image, sizeof(T));
  int64_t bytes = 0;
  for (const Level& level : problem.levels) bytes += problem.images * level.channels * level.pixels() * sizeof(T);
  const bool streaming = bytes > kStreamingBytes;
  if (problem.channels_last) backward_channels_last(problem, plans, grad, grad_maps, streaming);
  else backward_planar(problem, plans, grad, grad_maps, streaming);
}

// Level after level, so that the order of each point's sum does not depend on the threads.
template <typename T, typename C>
void backward_points(const PointSampleProblem& problem, const T* grad, const C* coordinates, const Coordinates& points,
                     const int64_t* image, const std::vector<const T*>& maps, C* grad_points) {
  using A = Accumulator<T>;
  const Plans<A> plans(problem, points, image, sizeof(T));
  std::fill_n(grad_points, 2 * problem.rows * problem.points, C(0));
  for (int64_t l = 0; l < int64_t(problem.levels.size()); ++l) {
    const Level& level = problem.levels[l];
    const int64_t elements = problem.rows * problem.points * level.channels;
    run(cut_points(problem, plans, {l, l + 1}), elements, [&] {
      return [&, dots = Scratch<A>(4 * kPoints)](const Piece& piece, const Piece*) mutable {
        const PlannedPoint<A>* some = plans.of(piece).points.data() + piece.range.begin;
        const T* map = maps[l] + piece.image * level.pixels() * level.channels;
        const T* g = grad + level.first_channel * problem.channel_step();
        const int64_t count = piece.range.size();
        if (problem.channels_last) dots_channels_last(level, some, count, map, g, dots.data());
        else dots_planar(problem, level, some, count, map, g, dots.data());
        for (int64_t i = 0; i < count; ++i) {
          const int64_t n = problem.point_at(some[i].place);
          const C scale_x = static_cast<C>(level.scale_x), scale_y = static_cast<C>(level.scale_y);
          add_point_gradient(axis_taps(coordinates[2 * n], scale_x, level.width, problem.how),
                             axis_taps(coordinates[2 * n + 1], scale_y, level.height, problem.how), scale_x, scale_y,
                             dots.data() + 4 * i, grad_points + 2 * n);
        }
      };
    });
  }
}
