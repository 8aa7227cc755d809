// The work of one thread in local importance-based pooling, on tensors in either layout.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/cuda_utils.cuh"
#include "lip_pool2d/problem.h"

namespace paper_layers {
namespace {

// The windows along one side of the image.
template <typename Index>
struct Axis {
  Index length, outputs, kernel, stride, padding;
  Divider<Index> by_stride;

  explicit Axis(const Side& side)
      : length(side.length),
        outputs(side.outputs),
        kernel(side.kernel),
        stride(side.stride),
        padding(side.padding),
        by_stride(side.stride) {}

  // Calls body(position, inside) for the positions of a window. Where the kernel's size K is known, there is no
  // branch, so that all loads are under way at once: a position outside the image becomes its nearest one, with
  // inside = false. K = 0: any size, positions inside only.
  template <int K, typename Body>
  C10_DEVICE void each_tap(Index output, Body body) const {
    const Index start = output * stride - padding;
    if constexpr (K > 0) {
#pragma unroll
      for (int tap = 0; tap < K; ++tap) {
        const Index position = start + tap;
        const bool before = position < 0, after = position >= length;
        body(before ? 0 : after ? length - 1 : position, !before && !after);
      }
    } else {
      const Index end = start + kernel < length ? start + kernel : length;
      for (Index position = start > 0 ? start : 0; position < end; ++position) body(position, true);
    }
  }

  // Calls body(output) for the outputs whose windows hold a position.
  template <typename Body>
  C10_DEVICE void each_cover(Index position, Body body) const {
    const Index above = position + padding - kernel;
    const Index below = by_stride(position + padding) + 1;
    const Index end = below < outputs ? below : outputs;
    for (Index output = above < 0 ? 0 : by_stride(above) + 1; output < end; ++output) body(output);
  }
};

template <typename Index>
struct Place {
  Index outer, row, column, inner;
};

// A tensor as [outer, rows, columns, inner]: NCHW is [N C, H, W, 1], channels_last [N, H, W, C].
template <typename Index>
struct Layout {
  Index rows, columns, inner;
  Divider<Index> by_rows, by_columns, by_inner;

  Layout(int64_t rows, int64_t columns, int64_t inner)
      : rows(rows),
        columns(columns),
        inner(inner),
        by_rows(std::max<int64_t>(rows, 1)),  // an image without pixels has a divider, too
        by_columns(std::max<int64_t>(columns, 1)),
        by_inner(inner) {}

  C10_DEVICE Place<Index> place(Index index) const {
    const Index pixel = by_inner(index), line = by_columns(pixel), plane = by_rows(line);
    return {plane, line - plane * rows, pixel - line * columns, index - pixel * inner};
  }
  C10_DEVICE Index at(Index outer, Index row, Index column, Index at_inner) const {
    return ((outer * rows + row) * columns + column) * inner + at_inner;
  }
};

// The images and their windows, counted in packs of V channels. Shared logits have one channel, in packs of 1.
template <typename Index_, int V_, bool Shared>
struct Shape {
  using Index = Index_;
  static constexpr int V = V_, L = Shared ? 1 : V_;
  static constexpr bool shared = Shared;

  Axis<Index> height, width;
  Layout<Index> image, windows;
  Divider<Index> planes_per_logit;

  explicit Shape(const LipPool2dProblem& problem)
      : height(problem.height),
        width(problem.width),
        image(problem.height.length, problem.width.length, problem.depth() / V),
        windows(problem.height.outputs, problem.width.outputs, problem.depth() / V),
        planes_per_logit(Shared ? problem.planes_per_image() : 1) {}

  // Where the logit of a place of the image, or the statistics of one of the windows, lie.
  C10_DEVICE Index logit_at(const Layout<Index>& layout, Index outer, Index row, Index column, Index inner) const {
    if constexpr (!Shared) return layout.at(outer, row, column, inner);
    return (planes_per_logit(outer) * layout.rows + row) * layout.columns + column;
  }

  template <int K, typename Body>
  C10_DEVICE void each_tap(const Place<Index>& window, Body body) const {
    height.template each_tap<K>(window.row, [&](Index row, bool row_inside) {
      width.template each_tap<K>(window.column, [&](Index column, bool column_inside) {
        body(row, column, row_inside && column_inside);
      });
    });
  }
};

// The logits of a window's tap; padding weighs nothing.
template <typename T, typename S, typename Index = typename S::Index>
C10_DEVICE Pack<Accumulator<T>, S::L> load_logit(const S& shape, const Pack<T, S::L>* logit,
                                                      const Place<Index>& window, Index row, Index column,
                                                      bool inside) {
  using A = Accumulator<T>;
  const Pack<T, S::L> packed = logit[shape.logit_at(shape.image, window.outer, row, column, window.inner)];
  Pack<A, S::L> result;
  for (int v = 0; v < S::L; ++v) {
    const A value = packed[v];
    result[v] = inside ? value : A(-INFINITY);
  }
  return result;
}

// The largest logits of a window. A NaN is passed over: its own exponential makes the window's sum NaN.
template <int K, typename T, typename S, typename Index = typename S::Index>
C10_DEVICE Pack<Accumulator<T>, S::L> largest_logit(const S& shape, const Pack<T, S::L>* logit,
                                                         const Place<Index>& window) {
  using A = Accumulator<T>;
  Pack<A, S::L> largest;
  for (int v = 0; v < S::L; ++v) largest[v] = A(-INFINITY);
  shape.template each_tap<K>(window, [&](Index row, Index column, bool inside) {
    const Pack<A, S::L> l = load_logit(shape, logit, window, row, column, inside);
    for (int v = 0; v < S::L; ++v) largest[v] = l[v] > largest[v] ? l[v] : largest[v];
  });
  return largest;
}

// The output of a window, as an O.
template <int K, typename T, typename S, typename O>
struct Forward {
  using A = Accumulator<T>;
  using Index = typename S::Index;
  static constexpr int V = S::V, L = S::L;

  S shape;
  const Pack<T, V>* input;
  const Pack<T, L>* logit;
  Pack<O, V>* output;

  C10_DEVICE void operator()(Index index) const {
    const Place<Index> window = shape.windows.place(index);
    const Pack<A, L> largest = largest_logit<K>(shape, logit, window);
    A sum[L] = {}, total[V] = {};
    shape.template each_tap<K>(window, [&](Index row, Index column, bool inside) {
      const Pack<A, L> l = load_logit(shape, logit, window, row, column, inside);
      const Pack<T, V> x = input[shape.image.at(window.outer, row, column, window.inner)];
      A weight[L];
      for (int v = 0; v < L; ++v) sum[v] += weight[v] = std::exp(l[v] - largest[v]);
      for (int v = 0; v < V; ++v) {
        const A value = x[v];
        total[v] += weight[v % L] * (inside ? value : A(0));
      }
    });
    Pack<O, V> result;
    for (int v = 0; v < V; ++v) result[v] = static_cast<O>(total[v] / sum[v % L]);
    output[index] = result;
  }
};

template <int K, typename T, typename S>
using Rounded = Forward<K, T, S, T>;
template <int K, typename T, typename S>
using Average = Forward<K, T, S, Accumulator<T>>;

// The largest logit of a window and one over the sum of its weights.
template <int K, typename T, typename S>
struct Statistics {
  using A = Accumulator<T>;
  using Index = typename S::Index;
  static constexpr int L = S::L;

  S shape;
  const Pack<T, L>* logit;
  Pack<A, L>* largest;
  Pack<A, L>* inverse_sum;

  C10_DEVICE void operator()(Index index) const {
    const Place<Index> window = shape.windows.place(index);
    const Pack<A, L> shift = largest_logit<K>(shape, logit, window);
    Pack<A, L> sum = {};
    shape.template each_tap<K>(window, [&](Index row, Index column, bool inside) {
      const Pack<A, L> l = load_logit(shape, logit, window, row, column, inside);
      for (int v = 0; v < L; ++v) sum[v] += std::exp(l[v] - shift[v]);
    });
    for (int v = 0; v < L; ++v) sum[v] = 1 / sum[v];
    largest[index] = shift;
    inverse_sum[index] = sum;
  }
};

// The gradients of an element and of its logit, from the windows that hold it. Those of shared logits are per
// channel, in the dtype of the sum over the channels that follows.
template <typename T, typename S>
struct Backward {
  using A = Accumulator<T>;
  using G = std::conditional_t<S::shared, A, T>;
  using Index = typename S::Index;
  static constexpr int V = S::V, L = S::L;

  S shape;
  const Pack<T, V>* grad;
  const Pack<T, V>* input;
  const Pack<T, L>* logit;
  const Pack<A, V>* average;
  const Pack<A, L>* largest;
  const Pack<A, L>* inverse_sum;
  Pack<T, V>* grad_input;
  Pack<G, V>* grad_logit;

  C10_DEVICE void operator()(Index index) const {
    const Place<Index> here = shape.image.place(index);
    const Pack<T, V> x = input[index];
    const Pack<T, L> l = logit[shape.logit_at(shape.image, here.outer, here.row, here.column, here.inner)];
    A dx[V] = {}, dl[V] = {};
    shape.height.each_cover(here.row, [&](Index row) {
      shape.width.each_cover(here.column, [&](Index column) {
        const Index window = shape.windows.at(here.outer, row, column, here.inner);
        const Index statistics = shape.logit_at(shape.windows, here.outer, row, column, here.inner);
        const Pack<T, V> g = grad[window];
        const Pack<A, V> mean = average[window];
        const Pack<A, L> shift = largest[statistics], scale = inverse_sum[statistics];
        A weight[L];
        for (int v = 0; v < L; ++v) weight[v] = std::exp(A(l[v]) - shift[v]) * scale[v];
        for (int v = 0; v < V; ++v) {
          const A share = weight[v % L] * A(g[v]);
          dx[v] += share;
          dl[v] += share * (A(x[v]) - mean[v]);
        }
      });
    });
    Pack<T, V> to_input;
    Pack<G, V> to_logit;
    for (int v = 0; v < V; ++v) {
      to_input[v] = static_cast<T>(dx[v]);
      to_logit[v] = static_cast<G>(dl[v]);
    }
    grad_input[index] = to_input;
    grad_logit[index] = to_logit;
  }
};

}  // namespace
}  // namespace paper_layers
