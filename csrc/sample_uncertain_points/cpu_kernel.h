// The most uncertain of given points on the CPU, compiled once for each instruction set.
#include "common/cpu_margins.h"
#include "common/cpu_smallest.h"

// Points that are sampled at once, so that what belongs to them stays in the first cache.
constexpr int64_t kTile = 256;

// The four pixels of each of a tile's points, in one class's map, and their weights.
template <typename T>
struct TileTaps {
  static constexpr int64_t kOutside = -1;

  int64_t count;
  int64_t offsets[kTile][4];
  float weights[kTile][4];
  bool inside[kTile];  // all four

  void set(const LogitMaps& maps, const float* points, int64_t number) {
    count = number;
    for (int64_t i = 0; i < count; ++i) {
      const AxisTaps<float> x = axis_taps(points[2 * i], static_cast<float>(maps.width), static_cast<int32_t>(maps.width), {});
      const AxisTaps<float> y = axis_taps(points[2 * i + 1], static_cast<float>(maps.height), static_cast<int32_t>(maps.height), {});
      inside[i] = x.has_first && x.has_second && y.has_first && y.has_second;
      const int64_t first = y.first * maps.row_stride + x.first * maps.column_stride;
      const auto set_tap = [&](int tap, bool there, int64_t offset, float weight) {
        offsets[i][tap] = there ? offset : kOutside;
        weights[i][tap] = weight;
      };
      const float left = 1 - x.fraction, top = 1 - y.fraction;
      set_tap(0, x.has_first && y.has_first, first, left * top);
      set_tap(1, x.has_second && y.has_first, first + maps.column_stride, x.fraction * top);
      set_tap(2, x.has_first && y.has_second, first + maps.row_stride, left * y.fraction);
      set_tap(3, x.has_second && y.has_second, first + maps.row_stride + maps.column_stride, x.fraction * y.fraction);
    }
  }

  template <typename A>
  void sample(const T* map, A* to) const {
    for (int64_t i = 0; i < count; ++i) {
      const auto *at = offsets[i];
      const float* weight = weights[i];
      A sum = 0;
      if (inside[i]) {
        for (int tap = 0; tap < 4; ++tap) sum += weight[tap] * A(map[at[tap]]);
      } else {
        for (int tap = 0; tap < 4; ++tap) sum += at[tap] == kOutside ? A(0) : weight[tap] * A(map[at[tap]]);
      }
      to[i] = sum;
    }
  }
};

template <typename T>
void sample_uncertain_points(const LogitMaps& maps, const T* logits, const int64_t* labels, const float* points,
                             int64_t candidates, int64_t wanted, int64_t* index) {
  using A = Accumulator<T>;
  const int64_t classes = labels != nullptr ? 1 : maps.classes;
  const auto margins_of = [&](int64_t image, int64_t begin, int64_t end, A* margins) {
    A second[kTile], sampled[2][kTile];
    TileTaps<T> taps;
    const T* from = logits + image * maps.image_stride + (labels != nullptr ? labels[image] * maps.class_stride : 0);
    const auto row = [&](int64_t c, int slot) {
      taps.sample(from + c * maps.class_stride, sampled[slot]);
      return static_cast<const A*>(sampled[slot]);
    };
    for (int64_t i = begin; i < end; i += kTile) {
      taps.set(maps, points + 2 * (image * candidates + i), std::min(kTile, end - i));
      if (classes == 1) magnitudes(row(0, 0), taps.count, margins + (i - begin));
      else margins_of_classes(classes, taps.count, second, margins + (i - begin), row);
    }
  };
  with_packing<A>(candidates, [&](auto packing) {
    write_smallest<decltype(packing)>(maps.images, candidates, wanted, 8 * classes, index, margins_of);
  });
}
