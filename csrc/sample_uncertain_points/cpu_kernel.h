// The most uncertain of given points on the CPU, compiled once for each instruction set.
#include "common/cpu_margins.h"
#include "common/cpu_smallest.h"

// Points that are sampled at once, so that what belongs to them stays in the first cache.
constexpr int64_t kTile = 256;

template <typename T>
void sample_uncertain_points(const LogitMaps& maps, const T* logits, const int64_t* labels, const float* points,
                             int64_t candidates, int64_t wanted, int64_t* index) {
  using A = Accumulator<T>;
  const int64_t classes = labels != nullptr ? 1 : maps.classes;
  const auto margins_of = [&](int64_t image, int64_t begin, int64_t end, A* margins) {
    A second[kTile], sampled[2][kTile];
    PointTaps taps[kTile];
    int64_t count = 0;
    const T* from = logits + image * maps.image_stride + (labels != nullptr ? labels[image] * maps.class_stride : 0);
    const auto row = [&](int64_t c, int slot) {
      for (int64_t i = 0; i < count; ++i) sampled[slot][i] = taps[i].template sample<A>(from + c * maps.class_stride);
      return static_cast<const A*>(sampled[slot]);
    };
    for (int64_t i = begin; i < end; i += kTile) {
      count = std::min(kTile, end - i);
      for (int64_t j = 0; j < count; ++j) taps[j] = PointTaps(maps, points + 2 * (image * candidates + i + j));
      if (classes == 1) magnitudes(row(0, 0), count, margins + (i - begin));
      else margins_of_classes(classes, count, second, margins + (i - begin), row);
    }
  };
  with_packing<A>(candidates, [&](auto packing) {
    write_smallest<decltype(packing)>(maps.images, candidates, wanted, 8 * classes, index, margins_of);
  });
}
