// The points as the kernels read them, computed once for all channels.

// A point as a level sees it: the taps, and where its first channel is in an output.
template <typename A>
struct PlannedPoint {
  int32_t pixels[4];
  A weights[4];
  int64_t place;

  PlannedPoint() = default;
  template <typename C>
  PAPER_LAYERS_INLINE PlannedPoint(const Taps<C>& taps, int64_t place) : place(place) {
    for (int i = 0; i < 4; ++i) {
      pixels[i] = taps.pixels[i];
      weights[i] = static_cast<A>(taps.weights[i]);
    }
  }

  bool inside() const { return (pixels[0] | pixels[1] | pixels[2] | pixels[3]) >= 0; }
  // The sum over taps of weight times value(pixel), without pixels outside.
  template <typename Value>
  PAPER_LAYERS_INLINE A sum(Value value) const {
    A total = 0;
    for (int i = 0; i < 4; ++i) total += pixels[i] < 0 ? A(0) : weights[i] * A(value(pixels[i]));
    return total;
  }
};

// One axis of several points at once, bilinear with zeros outside: as `axis_taps`.
template <typename A>
struct AxisVector {
  using V = Vec<A>;
  using Bits = typename V::BitLanes;
  Bits first, has_first, has_second;
  V fraction;

  PAPER_LAYERS_INLINE AxisVector(V coordinate, A scale, int64_t size) {
    const V length(static_cast<A>(size)), zero(A(0));
    const V x = unfused(coordinate * V(scale)) - V(A(0.5));
    const Bits there = (x.lanes > V(A(-1)).lanes) & (x.lanes < length.lanes);
    const V within(there ? x.lanes : zero.lanes);
    first = __builtin_convertvector(within.lanes, Bits);  // Towards zero.
    first += __builtin_convertvector(first, typename V::Lanes) > within.lanes;
    fraction = within - V(__builtin_convertvector(first, typename V::Lanes));
    has_first = there & (first >= 0);
    has_second = there & (first + 1 < static_cast<decltype(first[0] + 0)>(size));
  }

  PAPER_LAYERS_INLINE V weight(bool second) const { return second ? fraction : V(A(1)) - fraction; }
};

// A map that the caches hold, or of far more pixels than points, has its points in their own order.
inline bool is_small(const PointSampleProblem& problem, const Level& level, int64_t element_size) {
  const int64_t together = problem.channels_last ? level.channels : std::min(level.channels, kPlanes);
  return together * level.pixels() * element_size <= kBandBytes / 2 || 16 * problem.points < level.pixels();
}

// The points of a row in their order, bilinear with zeros outside, a vector of them at a time.
template <typename A>
void plan_row(const PointSampleProblem& problem, const Level& level, const A* coordinates, int64_t place,
              PlannedPoint<A>* to) {
  using V = Vec<A>;
  using Bits = typename V::BitLanes;
  const int64_t step = problem.channels_last ? problem.channels : 1;
  const A scale_x = static_cast<A>(level.scale_x), scale_y = static_cast<A>(level.scale_y);
  for (int64_t i = 0; i < problem.points; i += V::size) {
    const int64_t count = std::min<int64_t>(V::size, problem.points - i);
    A buffer[2 * V::size] = {};
    const A* from = coordinates + 2 * i;
    if (count < V::size) from = std::copy_n(from, 2 * count, buffer) - 2 * count;
    const V low = load(from), high = load(from + V::size);
    const AxisVector<A> x(even_lanes(low, high), scale_x, level.width), y(odd_lanes(low, high), scale_y, level.height);
    Bits pixels[4];
    V weights[4];
    const Bits corner = y.first * level.width + x.first;
    for (int t = 0; t < 4; ++t) {
      const bool right = t & 1, bottom = t & 2;
      const Bits there = (right ? x.has_second : x.has_first) & (bottom ? y.has_second : y.has_first);
      pixels[t] = (corner + (bottom ? level.width : 0) + right) | ~there;
      weights[t] = V(there ? (x.weight(right) * y.weight(bottom)).lanes : V(A(0)).lanes);
    }
    for (int64_t j = 0; j < count; ++j, ++to, place += step) {
      for (int t = 0; t < 4; ++t) {
        to->pixels[t] = static_cast<int32_t>(pixels[t][j]);
        to->weights[t] = weights[t].lanes[j];
      }
      to->place = place;
    }
  }
}

// The points of an image; where the map is not small, from its top row to the bottom one, so that points near one
// another follow one another.
template <typename A>
struct Plan {
  static constexpr int64_t kLine = 64;

  std::vector<PlannedPoint<A>> points;
  // Where the points begin whose taps begin in a group of the map's rows; the last are outside. Empty for a small map.
  std::vector<int64_t> starts;
  int shift = 0;                // a group has 2^shift rows: more than one where a map has very many
  std::vector<int32_t> lines;   // pixels in ascending order, one of each cache line of a plane that is read

  bool in_order() const { return starts.empty(); }

  // The points with taps in a range of the map's rows, and maybe some more.
  Range touching(Range rows) const {
    if (in_order()) return {0, int64_t(points.size())};
    return {starts[std::max<int64_t>(rows.begin - 1, 0) >> shift], starts[((rows.end - 1) >> shift) + 1]};
  }

  template <typename C>
  void build(const PointSampleProblem& problem, const Level& level, const C* coordinates, const int64_t* rows,
             int64_t row_count, int64_t element_size, bool lines_wanted) {
    points.resize(row_count * problem.points);
    const C scale_x = static_cast<C>(level.scale_x), scale_y = static_cast<C>(level.scale_y);
    const auto each = [&](auto&& body) __attribute__((always_inline)) {
      for (int64_t i = 0; i < row_count; ++i) {
        int64_t n = rows[i] * problem.points, place = problem.place(n);
        const int64_t step = problem.channels_last ? problem.channels : 1;
        for (const int64_t end = n + problem.points; n < end; ++n, place += step) {
          const auto x = axis_taps(coordinates[2 * n], scale_x, level.width, problem.how);
          const auto y = axis_taps(coordinates[2 * n + 1], scale_y, level.height, problem.how);
          body(place, x, y);
        }
      }
    };
    if (is_small(problem, level, element_size)) {
      PlannedPoint<A>* point = points.data();
      if constexpr (std::is_same_v<A, C>) {
        if (!problem.how.nearest && !problem.how.border) {
          for (int64_t i = 0; i < row_count; ++i, point += problem.points) {
            plan_row(problem, level, coordinates + 2 * rows[i] * problem.points, problem.place(rows[i] * problem.points), point);
          }
          return;
        }
      }
      each([&](int64_t place, auto x, auto y) { *point++ = PlannedPoint<A>(make_taps(x, y, level.width), place); });
      return;
    }
    constexpr int64_t kGroups = 1 << 20;
    for (shift = 0; (level.height - 1) >> shift >= kGroups;) ++shift;
    const int64_t outside = ((level.height - 1) >> shift) + 1;
    starts.assign(outside + 2, 0);
    const auto group_of = [&](const auto& x, const auto& y) {
      const bool there = (x.has_first || x.has_second) && (y.has_first || y.has_second);
      return there ? int64_t(std::max(y.first, 0)) >> shift : outside;
    };
    each([&](int64_t, auto x, auto y) { ++starts[group_of(x, y) + 1]; });
    for (int64_t group = 0; group <= outside; ++group) starts[group + 1] += starts[group];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    std::vector<bool> read(lines_wanted ? level.pixels() * element_size / kLine + 1 : 0);
    each([&](int64_t place, auto x, auto y) {
      PlannedPoint<A>& point = points[next[group_of(x, y)]++];
      point = PlannedPoint<A>(make_taps(x, y, level.width), place);
      for (const int32_t pixel : point.pixels) {
        if (lines_wanted && pixel >= 0) read[pixel * element_size / kLine] = true;
      }
    });
    lines.clear();
    for (size_t line = 0; line < read.size(); ++line) {
      if (read[line]) lines.push_back(static_cast<int32_t>(line * kLine / element_size));
    }
  }
};

// A piece of the work: so many of a level's planes, rows or points.
struct Piece {
  int64_t image, level;
  Range range;
};

// The plans of all images and levels.
template <typename A>
struct Plans {
  std::vector<Plan<A>> plans;
  int64_t levels;

  Plans(const PointSampleProblem& problem, const Coordinates& points, const int64_t* image, int64_t element_size,
        bool lines_wanted = false)
      : plans(problem.images * problem.levels.size()), levels(problem.levels.size()) {
    std::vector<int64_t> rows(problem.rows), starts(problem.images + 1);
    const auto image_of = [&](int64_t row) { return image != nullptr ? image[row] : row; };
    for (int64_t row = 0; row < problem.rows; ++row) ++starts[image_of(row) + 1];
    for (int64_t i = 0; i < problem.images; ++i) starts[i + 1] += starts[i];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t row = 0; row < problem.rows; ++row) rows[next[image_of(row)]++] = row;
    const int64_t grain = 1 + kGrainPoints / std::max<int64_t>(1, problem.points);
    parallel_for(0, plans.size(), grain, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) {
        const int64_t i = begin / levels;
        if (problem.levels[begin % levels].channels == 0) continue;
        points.visit([&](const auto* coordinates) {
          plans[begin].build(problem, problem.levels[begin % levels], coordinates, rows.data() + starts[i],
                             starts[i + 1] - starts[i], element_size, lines_wanted);
        });
      }
    });
  }

  const Plan<A>& of(const Piece& piece) const { return plans[piece.image * levels + piece.level]; }
};

// All pieces, with the levels of an image in turn, so that threads share out large ones and small ones alike: `size`
// of a (image, level) is cut up by `step`.
template <typename Size, typename Step>
std::vector<Piece> cut(const PointSampleProblem& problem, Size size, Step step) {
  std::vector<Piece> pieces;
  for (int64_t image = 0; image < problem.images; ++image) {
    bool more = true;
    for (int64_t i = 0; more; ++i) {
      more = false;
      for (int64_t level = 0; level < int64_t(problem.levels.size()); ++level) {
        const int64_t length = size(image, level), width = step(image, level), begin = i * width;
        if (begin >= length) continue;
        pieces.push_back({image, level, {begin, std::min(length, begin + width)}});
        more = true;
      }
    }
  }
  return pieces;
}

// Pieces of the plans' points for the levels in a range.
constexpr int64_t kPoints = 128;
template <typename A>
std::vector<Piece> cut_points(const PointSampleProblem& problem, const Plans<A>& plans, Range levels) {
  const auto size = [&](int64_t image, int64_t level) {
    return levels.begin <= level && level < levels.end ? int64_t(plans.of({image, level, {}}).points.size()) : 0;
  };
  return cut(problem, size, [](int64_t, int64_t) { return kPoints; });
}

// Calls make()(piece) for all pieces, make() once for many. `elements` are those of all pieces.
template <typename Make>
void run(const std::vector<Piece>& pieces, int64_t elements, const Make& make) {
  const int64_t grain = 1 + int64_t(pieces.size()) * kGrainElements / std::max<int64_t>(1, elements);
  parallel_for(0, pieces.size(), grain, [&](int64_t begin, int64_t end) {
    auto work = make();
    for (; begin < end; ++begin) work(pieces[begin], begin + 1 < end ? &pieces[begin + 1] : nullptr);
  });
}
