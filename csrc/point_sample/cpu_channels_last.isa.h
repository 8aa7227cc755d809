// Channels_last: a pixel is a row of all channels, and vectors run along it. Points are in the outer loop, and what the
// next ones need is fetched meanwhile.

// Points that are fetched before their turn.
constexpr int64_t kAhead = 8;

template <typename T>
PAPER_LAYERS_INLINE void fetch_row(const T* row, int64_t channels) {
  for (int64_t c = 0; c < channels; c += 64 / sizeof(T)) __builtin_prefetch(row + c, 0, 2);
}

// The rows of a point's taps within the map, and their weights.
template <typename T>
struct Rows {
  using A = Accumulator<T>;
  const T* rows[4];
  A weights[4];
  int count = 0;

  Rows(const PlannedPoint<A>& point, const T* map, int64_t channels) {
    for (int t = 0; t < 4; ++t) {
      if (point.pixels[t] < 0) continue;
      rows[count] = map + point.pixels[t] * channels;
      weights[count++] = point.weights[t];
    }
  }
};

template <bool streaming, typename T>
void sample_rows(const Rows<T>& from, int64_t channels, T* out) {
  using V = Vec<Accumulator<T>>;
  if (from.count == 0) std::fill_n(out, channels, T(0));
  else if (from.count == 4) {
    const V w0(from.weights[0]), w1(from.weights[1]), w2(from.weights[2]), w3(from.weights[3]);
    const auto sample = [&](int64_t c, auto lanes) __attribute__((always_inline)) {
      V sum = load(from.rows[0] + c, lanes) * w0;
      sum = multiply_add(load(from.rows[1] + c, lanes), w1, sum);
      sum = multiply_add(load(from.rows[2] + c, lanes), w2, sum);
      return multiply_add(load(from.rows[3] + c, lanes), w3, sum);
    };
    if constexpr (streaming) {
      for (int64_t c = 0; c < channels; c += V::size) store_streaming(out + c, sample(c, Full{}));
    } else {
      cover<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        store(out + c, sample(c, lanes), lanes);
      });
    }
  } else {
    cover<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
      V sum = load(from.rows[0] + c, lanes) * V(from.weights[0]);
      for (int r = 1; r < from.count; ++r) sum = multiply_add(load(from.rows[r] + c, lanes), V(from.weights[r]), sum);
      store(out + c, sum, lanes);
    });
  }
}

template <typename T>
void forward_channels_last(const PointSampleProblem& problem, const Plans<Accumulator<T>>& plans,
                           const std::vector<const T*>& maps, T* output, bool streaming) {
  using V = Vec<Accumulator<T>>;
  run(cut_points(problem, plans, {0, plans.levels}), problem.rows * problem.points * problem.channels, [&] {
    return [&](const Piece& piece, const Piece*) {
      const Level& level = problem.levels[piece.level];
      const auto& plan = plans.of(piece);
      const int64_t channels = level.channels;
      const T* map = maps[piece.level] + piece.image * level.pixels() * channels;
      for (int64_t i = piece.range.begin; i < piece.range.end; ++i) {
        if (channels < V::size) {  // Parts of vectors cost more than numbers.
          const PlannedPoint<Accumulator<T>>& point = plan.points[i];
          T* const out = output + point.place + level.first_channel;
          const bool inside = point.inside();
          for (int64_t c = 0; c < channels; ++c) {
            const T* const at = map + c;
            if (inside) {
              out[c] = static_cast<T>(point.weights[0] * at[point.pixels[0] * channels] +
                                      point.weights[1] * at[point.pixels[1] * channels] +
                                      point.weights[2] * at[point.pixels[2] * channels] +
                                      point.weights[3] * at[point.pixels[3] * channels]);
              continue;
            }
            out[c] = static_cast<T>(point.sum([&](int32_t pixel) { return at[pixel * channels]; }));
          }
          continue;
        }
        if (i + kAhead < piece.range.end) {
          const Rows<T> later(plan.points[i + kAhead], map, channels);
          for (int r = 0; r < later.count; ++r) fetch_row(later.rows[r], channels);
        }
        const Rows<T> from(plan.points[i], map, channels);
        T* out = output + plan.points[i].place + level.first_channel;
        if constexpr (std::is_same_v<T, Accumulator<T>>) {
          if (streaming && channels % V::size == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(V) == 0) {
            sample_rows<true>(from, channels, out);
            continue;
          }
        }
        sample_rows<false>(from, channels, out);
      }
      if (streaming) finish_streaming();
    };
  });
}

template <typename T>
void backward_channels_last(const PointSampleProblem& problem, const Plans<Accumulator<T>>& plans, const T* grad,
                            const std::vector<T*>& grad_maps, bool streaming) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const auto height = [&](int64_t, int64_t level) {
    return problem.levels[level].channels > 0 ? int64_t(problem.levels[level].height) : 0;
  };
  const auto band = [&](int64_t, int64_t level) {
    const Level& l = problem.levels[level];
    return std::max<int64_t>(1, kBandBytes / (sizeof(A) * l.width * std::max<int64_t>(l.channels, 1)));
  };
  int64_t elements = problem.rows * problem.points * problem.channels;
  for (const Level& level : problem.levels) elements += problem.images * level.channels * level.pixels();
  run(cut(problem, height, band), elements, [&] {
    return [&, sums = Scratch<A>()](const Piece& piece, const Piece*) mutable {
      const Level& level = problem.levels[piece.level];
      const auto& plan = plans.of(piece);
      const int64_t channels = level.channels, first = piece.range.begin * level.width;
      const int64_t size = piece.range.size() * level.width;
      const T* from = grad + level.first_channel;
      T* const to = grad_maps[piece.level] + (piece.image * level.pixels() + first) * channels;
      A* total = nullptr;
      if constexpr (std::is_same_v<T, A>) total = plan.in_order() ? to : nullptr;
      const bool in_place = total != nullptr;
      if (in_place) {
        std::fill_n(to, size * channels, T(0));
      } else {
        sums.assign(size * channels, A(0));
        total = sums.data();
      }
      const Range points = plan.touching(piece.range);
      for (int64_t i = points.begin; i < points.end; ++i) {
        if (i + kAhead < points.end) fetch_row(from + plan.points[i + kAhead].place, channels);
        const PlannedPoint<A>& point = plan.points[i];
        const T* g = from + point.place;
        for (int t = 0; t < 4; ++t) {
          const int64_t pixel = point.pixels[t] - first;
          if (pixel < 0 || pixel >= size) continue;
          A* sum = total + pixel * channels;
          const V weight(point.weights[t]);
          int64_t c = 0;
          for (; c + V::size <= channels; c += V::size) store(sum + c, multiply_add(load(g + c), weight, load(sum + c)));
          for (; c < channels; ++c) sum[c] += point.weights[t] * static_cast<A>(g[c]);
        }
      }
      if (!in_place) write(sums.data(), size * channels, to, streaming);
    };
  });
}

// See dots_planar.
template <typename T, typename A>
void dots_channels_last(const Level& level, const PlannedPoint<A>* points, int64_t count, const T* map, const T* grad,
                        A* dots) {
  using V = Vec<A>;
  const int64_t channels = level.channels;
  for (int64_t i = 0; i < 4 * count; ++i) {
    const int32_t pixel = points[i / 4].pixels[i % 4];
    dots[i] = 0;
    if (pixel < 0) continue;
    const T *g = grad + points[i / 4].place, *row = map + pixel * channels;
    V sum(A(0));
    int64_t c = 0;
    for (; c + V::size <= channels; c += V::size) sum = multiply_add(load(g + c), load(row + c), sum);
    dots[i] = total_of(sum.lanes);
    for (; c < channels; ++c) dots[i] += static_cast<A>(g[c]) * static_cast<A>(row[c]);
  }
}
