// The most uncertain pixels on the CPU, compiled once for each instruction set.
#include "common/cpu_margins.isa.h"
#include "common/cpu_top_k.isa.h"

// Pixels whose margins are computed at once, so that what belongs to them stays in the first cache.
constexpr int64_t kTile = 1024;

// Logits of a tile's pixels, class by class.
template <typename T>
struct TileRows {
  const T* logits;
  int64_t class_stride, pixel_stride, count;
  T (*buffers)[kTile];

  const T* operator()(int64_t c, int slot) const {
    const T* from = logits + c * class_stride;
    if (pixel_stride == 1) return from;
    for (int64_t i = 0; i < count; ++i) buffers[slot][i] = from[i * pixel_stride];
    return buffers[slot];
  }
};

template <typename T>
void uncertain_points(const LogitMaps& maps, const T* logits, const int64_t* labels, int64_t wanted, int64_t* index) {
  using A = Accumulator<T>;
  const int64_t classes = labels != nullptr ? 1 : maps.classes, pixel_stride = maps.pixel_stride();
  // Pixels apart from each other: all their classes stay in the cache while one after the other is read.
  const int64_t in_cache = 24576 / (static_cast<int64_t>(sizeof(T)) * classes) / 64 * 64;
  const int64_t tile = pixel_stride == 1 ? kTile : std::max<int64_t>(64, std::min(kTile, in_cache));
  const auto margins_of = [&](int64_t image, int64_t begin, int64_t end, A* margins) {
    A second[kTile];
    T buffers[2][kTile];
    const T* from = logits + image * maps.image_stride + (labels != nullptr ? labels[image] * maps.class_stride : 0);
    for (int64_t i = begin; i < end; i += tile) {
      const int64_t count = std::min(tile, end - i);
      const TileRows<T> row{from + i * pixel_stride, maps.class_stride, pixel_stride, count, buffers};
      if (classes == 1) magnitudes(row(0, 0), count, margins + (i - begin));
      else margins_of_classes(classes, count, second, margins + (i - begin), row);
    }
  };
  with_packing<A>(maps.pixels(), [&](auto packing) {
    write_smallest<decltype(packing)>(maps.images, maps.pixels(), wanted, classes, index, margins_of);
  });
}
