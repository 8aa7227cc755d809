// NCHW: planes are in the outer loop, so that each is read or written once, and what the next ones need is fetched
// meanwhile: the processor does not guess it from points here and there. Plain loads: gathering into vectors takes
// several times as long.

// Points after which some more is fetched.
constexpr int64_t kFetchEvery = 8;

// The planes of a piece, one after another in memory.
template <typename E>
E* planes_of(E* map, const Level& level, const Piece& piece) {
  return map + (piece.image * level.channels + piece.range.begin) * level.pixels();
}

inline std::vector<Piece> cut_planes(const PointSampleProblem& problem) {
  const auto channels = [&](int64_t, int64_t level) { return problem.levels[level].channels; };
  return cut(problem, channels, [](int64_t, int64_t) { return kPlanes; });
}

// Lines of planes, fetched a few at a time.
template <typename T>
class Fetch {
 public:
  Fetch() = default;
  Fetch(const Plan<Accumulator<T>>& plan, const T* planes, int64_t size, int64_t count, int64_t steps)
      : lines_(plan.lines.data()),
        left_(plan.lines.size()),
        step_(left_ / std::max<int64_t>(steps, 1) + 1),
        planes_(planes),
        size_(size),
        count_(count) {}

  PAPER_LAYERS_INLINE void step() {
    const int64_t now = std::min(left_, step_);
    for (int64_t b = 0; b < count_; ++b) {
      for (int64_t i = 0; i < now; ++i) __builtin_prefetch(planes_ + b * size_ + lines_[i], 0, 2);
    }
    lines_ += now;
    left_ -= now;
  }

 private:
  const int32_t* lines_ = nullptr;
  int64_t left_ = 0, step_ = 0;
  const T* planes_ = nullptr;
  int64_t size_ = 0, count_ = 0;
};

template <int64_t count, typename T>
void sample_planes(const Plan<Accumulator<T>>& plan, const T* planes, int64_t size, T* output, int64_t channel_step,
                   Fetch<T> fetch) {
  int64_t i = 0;
  for (const auto& point : plan.points) {
    T* out = output + point.place;
    if (point.inside()) {
#pragma GCC unroll 8
      for (int64_t b = 0; b < count; ++b) {
        const T* plane = planes + b * size;
        out[b * channel_step] =
            static_cast<T>(point.weights[0] * plane[point.pixels[0]] + point.weights[1] * plane[point.pixels[1]] +
                           point.weights[2] * plane[point.pixels[2]] + point.weights[3] * plane[point.pixels[3]]);
      }
    } else {
      for (int64_t b = 0; b < count; ++b) {
        const T* plane = planes + b * size;
        out[b * channel_step] = static_cast<T>(point.sum([&](int32_t pixel) { return plane[pixel]; }));
      }
    }
    if (++i % kFetchEvery == 0) fetch.step();
  }
}

template <typename T>
void forward_planar(const PointSampleProblem& problem, const Plans<Accumulator<T>>& plans,
                    const std::vector<const T*>& maps, T* output) {
  run(cut_planes(problem), problem.rows * problem.points * problem.channels, [&] {
    return [&](const Piece& piece, const Piece* next) {
      const Level& level = problem.levels[piece.level];
      const auto& plan = plans.of(piece);
      Fetch<T> fetch;
      if (next != nullptr) {
        const Level& l = problem.levels[next->level];
        fetch = Fetch<T>(plans.of(*next), planes_of(maps[next->level], l, *next), l.pixels(), next->range.size(),
                         plan.points.size() / kFetchEvery);
      }
      const T* from = planes_of(maps[piece.level], level, piece);
      T* out = output + (level.first_channel + piece.range.begin) * problem.points;
      if (piece.range.size() == kPlanes) {
        sample_planes<kPlanes>(plan, from, level.pixels(), out, problem.points, fetch);
        return;
      }
      for (int64_t b = 0; b < piece.range.size(); ++b, fetch = {}) {
        sample_planes<1>(plan, from + b * level.pixels(), level.pixels(), out + b * problem.points, problem.points,
                         fetch);
      }
    };
  });
}

// Adds up the gradients of `count` planes' pixels from `first` on, `size` of each, which are `size + 1` apart in
// sums: the last takes what belongs to others.
template <int64_t count, typename T, typename A>
void add_planes(const Plan<A>& plan, Range points, const T* grad, const T* next_grad, int64_t channel_step,
                int64_t first, int64_t size, A* sums) {
  const uint32_t begin = static_cast<uint32_t>(first), others = static_cast<uint32_t>(size);
  for (int64_t i = points.begin; i < points.end; ++i) {
    const PlannedPoint<A>& point = plan.points[i];
    uint32_t pixels[4];
    for (int t = 0; t < 4; ++t) pixels[t] = std::min(static_cast<uint32_t>(point.pixels[t]) - begin, others);
    for (int64_t b = 0; b < count; ++b) {
      const A g = static_cast<A>(grad[point.place + b * channel_step]);
      __builtin_prefetch(next_grad + point.place + b * channel_step, 0, 2);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) sums[b * (size + 1) + pixels[t]] += point.weights[t] * g;
    }
  }
}

// The same for whole planes of `size` pixels, in place.
template <int64_t count, typename T>
void add_planes_in_place(const Plan<T>& plan, const T* grad, int64_t channel_step, int64_t size, T* to) {
  for (const PlannedPoint<T>& point : plan.points) {
    T g[count];
    for (int64_t b = 0; b < count; ++b) g[b] = grad[point.place + b * channel_step];
    for (int t = 0; t < 4; ++t) {
      if (point.pixels[t] < 0) continue;
      for (int64_t b = 0; b < count; ++b) to[b * size + point.pixels[t]] += point.weights[t] * g[b];
    }
  }
}

template <typename T>
void backward_planar(const PointSampleProblem& problem, const Plans<Accumulator<T>>& plans, const T* grad,
                     const std::vector<T*>& grad_maps, bool streaming) {
  using A = Accumulator<T>;
  int64_t pixels = 0;
  for (const Level& level : problem.levels) pixels += problem.images * level.channels * level.pixels();
  run(cut_planes(problem), pixels + problem.rows * problem.points * problem.channels, [&] {
    return [&, sums = Scratch<A>()](const Piece& piece, const Piece*) mutable {
      const Level& level = problem.levels[piece.level];
      const auto& plan = plans.of(piece);
      const int64_t count = piece.range.size();
      const int64_t band = std::clamp<int64_t>(kBandBytes / (kPlanes * sizeof(A) * level.width), 1, level.height);
      T* to = planes_of(grad_maps[piece.level], level, piece);
      const T* from = grad + (level.first_channel + piece.range.begin) * problem.points;
      if constexpr (std::is_same_v<T, A>) {
        if (plan.in_order()) {
          std::fill_n(to, count * level.pixels(), T(0));
          if (count == kPlanes) add_planes_in_place<kPlanes>(plan, from, problem.points, level.pixels(), to);
          for (int64_t b = 0; b < count && count < kPlanes; ++b) {
            add_planes_in_place<1>(plan, from + b * problem.points, 0, 0, to + b * level.pixels());
          }
          return;
        }
      }
      const T* next = from + (piece.range.end < level.channels ? kPlanes * problem.points : 0);
      for (int64_t row = 0; row < level.height; row += band) {
        const Range rows = {row, std::min<int64_t>(row + band, level.height)};
        const int64_t first = row * level.width, size = rows.size() * level.width;
        sums.assign(count * (size + 1), A(0));
        if (count == kPlanes) {
          add_planes<kPlanes>(plan, plan.touching(rows), from, next, problem.points, first, size, sums.data());
        } else {
          for (int64_t b = 0; b < count; ++b) {
            const T* g = from + b * problem.points;
            add_planes<1>(plan, plan.touching(rows), g, g, problem.points, first, size, sums.data() + b * (size + 1));
          }
        }
        for (int64_t b = 0; b < count; ++b) {
          write(sums.data() + b * (size + 1), size, to + b * level.pixels() + first, streaming);
        }
      }
    };
  });
}

// For some points of a plan: the sums over channels of gradient times value, four for each point by the tap.
template <typename T, typename A>
void dots_planar(const PointSampleProblem& problem, const Level& level, const PlannedPoint<A>* points, int64_t count,
                 const T* planes, const T* grad, A* dots) {
  std::fill_n(dots, 4 * count, A(0));
  for (int64_t c = 0; c < level.channels; ++c, planes += level.pixels(), grad += problem.points) {
    for (int64_t i = 0; i < count; ++i) {
      const A g = static_cast<A>(grad[points[i].place]);
      for (int t = 0; t < 4; ++t) {
        if (points[i].pixels[t] >= 0) dots[4 * i + t] += g * static_cast<A>(planes[points[i].pixels[t]]);
      }
    }
  }
}
