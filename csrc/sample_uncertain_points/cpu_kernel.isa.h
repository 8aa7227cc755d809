// The most uncertain of given points on the CPU, compiled once for each instruction set.
#include "common/cpu_margins.isa.h"
#include "common/cpu_top_k.isa.h"

// Points that are sampled at once, so that what belongs to them stays in the first cache.
constexpr int64_t kTile = 256;

// The pixels of a tile's points and their weights, in vectors of points. A pixel outside is not looked at: another one
// is read in its place, which there must be.
template <typename A>
struct TileTaps {
  using V = Vec<A>;
  using Bits = std::decay_t<decltype(typename V::BitLanes{}[0])>;

  int64_t offsets[4][kTile] = {};
  A weights[4][kTile] = {};
  Bits there[4][kTile] = {};

  // Flattened, so that what is shared with the GPU is compiled for this instruction set.
  __attribute__((flatten)) void set(const LogitMaps& maps, const float* points, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const PointTaps taps(maps, points + 2 * i);
      for (int t = 0; t < 4; ++t) {
        offsets[t][i] = taps.offsets[t];
        weights[t][i] = taps.weights[t];
        there[t][i] = -Bits(taps.inside[t]);
      }
    }
  }

  // Writes whole vectors.
  template <typename T>
  void sample(const T* map, int64_t count, A* to) const {
    for (int64_t i = 0; i < count; i += V::size) {
      V sum(A(0));
      for (int t = 0; t < 4; ++t) {
        typename V::Lanes value;
        for (int64_t j = 0; j < V::size; ++j) value[j] = A(map[offsets[t][i + j]]);
        typename V::BitLanes inside;
        std::memcpy(&inside, there[t] + i, sizeof(inside));
        sum = multiply_add(load(weights[t] + i), V(inside ? value : typename V::Lanes{}), sum);
      }
      store(to + i, sum);
    }
  }
};

template <typename T>
void sample_uncertain_points(const LogitMaps& maps, const T* logits, const int64_t* labels, const float* points,
                             int64_t candidates, int64_t wanted, int64_t* index) {
  using A = Accumulator<T>;
  const int64_t classes = labels != nullptr ? 1 : maps.classes;
  const T no_pixel = 0;
  const auto margins_of = [&](int64_t image, int64_t begin, int64_t end, A* margins) {
    A second[kTile], sampled[2][kTile];
    TileTaps<A> taps;
    int64_t count = 0;
    const T* from = logits + image * maps.image_stride + (labels != nullptr ? labels[image] * maps.class_stride : 0);
    const auto row = [&](int64_t c, int slot) {
      taps.sample(maps.pixels() > 0 ? from + c * maps.class_stride : &no_pixel, count, sampled[slot]);
      return static_cast<const A*>(sampled[slot]);
    };
    for (int64_t i = begin; i < end; i += kTile) {
      count = std::min(kTile, end - i);
      taps.set(maps, points + 2 * (image * candidates + i), count);
      if (classes == 1) magnitudes(row(0, 0), count, margins + (i - begin));
      else margins_of_classes(classes, count, second, margins + (i - begin), row);
    }
  };
  with_packing<A>(candidates, [&](auto packing) {
    write_smallest<decltype(packing)>(maps.images, candidates, wanted, 8 * classes, index, margins_of);
  });
}
