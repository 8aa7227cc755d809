// The pixels that a point takes from a map, and their weights, for the CPU and the CUDA kernels.
#pragma once

#include <cmath>
#include <cstdint>

#include <torch/headeronly/macros/Macros.h>

namespace paper_layers {

struct Sampling {
  bool nearest = false;  // else bilinear
  bool border = false;   // outside is the nearest pixel, else zero
};

// a * b, not fused with what follows: a point has the same pixels whatever the instruction set.
template <typename C>
C10_HOST_DEVICE inline C rounded_product(C a, C b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(C) == sizeof(float)) return __fmul_rn(a, b);
  else return __dmul_rn(a, b);
#else
  C product = a * b;
#if defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
#endif
}

// Along one axis: two pixels in a row, the second of weight `fraction`.
template <typename C>
struct AxisTaps {
  int32_t first = 0;
  C fraction = 0;
  bool has_first = false, has_second = false;  // within the map
  bool moves = false;                          // with the point, or is held at the border
};

// The taps of a point's coordinate, with `scale` pixels for each unit. NaN has no pixels; any number is safe.
template <typename C>
C10_HOST_DEVICE inline AxisTaps<C> axis_taps(C coordinate, C scale, int32_t size, Sampling how) {
  AxisTaps<C> taps;
  C x = rounded_product(coordinate, scale) - C(0.5);
  const C last = static_cast<C>(size - 1);
  bool held = false;
  if (how.border && x <= 0) x = 0, held = true;
  if (how.border && x >= last) x = last, held = true;
  if (!(x > C(-1) && x < C(size))) return taps;
  const C low = how.nearest ? std::rint(x) : std::floor(x);
  taps.first = static_cast<int32_t>(low);
  taps.has_first = taps.first >= 0 && taps.first < size;
  if (how.nearest) return taps;
  taps.fraction = x - low;
  taps.has_second = taps.first + 1 < size;
  taps.moves = !held;
  return taps;
}

// Top left, top right, bottom left, bottom right. A pixel's number in the map, or -1 outside, where the weight is 0.
template <typename C>
struct Taps {
  int32_t pixels[4];
  C weights[4];
};

template <typename C>
C10_HOST_DEVICE inline Taps<C> make_taps(AxisTaps<C> x, AxisTaps<C> y, int32_t width) {
  Taps<C> taps;
  for (int i = 0; i < 4; ++i) {
    const bool right = i & 1, bottom = i & 2;
    const bool there = (right ? x.has_second : x.has_first) && (bottom ? y.has_second : y.has_first);
    taps.pixels[i] = there ? (y.first + bottom) * width + x.first + right : -1;
    taps.weights[i] = there ? (right ? x.fraction : 1 - x.fraction) * (bottom ? y.fraction : 1 - y.fraction) : C(0);
  }
  return taps;
}

// The taps of a point (x, y), 0 to 1 across the map.
template <typename C>
C10_HOST_DEVICE inline Taps<C> make_taps(const C* point, int32_t height, int32_t width, Sampling how = {}) {
  return make_taps(axis_taps(point[0], C(width), width, how), axis_taps(point[1], C(height), height, how), width);
}

}  // namespace paper_layers
