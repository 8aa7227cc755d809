// The points as the kernels read them, computed once for all channels.

// A point as a level sees it: the taps, and where its first channel is in an output.
template <typename A>
struct PlannedPoint {
  int32_t pixels[4];
  A weights[4];
  int64_t place;

  bool inside() const { return (pixels[0] | pixels[1] | pixels[2] | pixels[3]) >= 0; }
  // The sum over taps of weight times value(pixel), without pixels outside.
  template <typename Value>
  PAPER_LAYERS_INLINE A sum(Value value) const {
    A total = 0;
    for (int i = 0; i < 4; ++i) total += pixels[i] < 0 ? A(0) : weights[i] * A(value(pixels[i]));
    return total;
  }
};

// The points of an image, from the top row of a level's map to the bottom one, so that points near one another follow
// one another.
template <typename A>
struct Plan {
  static constexpr int64_t kLine = 64;

  std::vector<PlannedPoint<A>> points;
  std::vector<int64_t> starts;  // of the points whose taps begin in a group of the map's rows; the last are outside
  int shift = 0;                // a group has 2^shift rows: more than one where a map has very many
  std::vector<int32_t> lines;   // pixels in ascending order, one of each cache line of a plane that is read

  // The points with taps in a range of the map's rows, and maybe some more.
  Range touching(Range rows) const {
    return {starts[std::max<int64_t>(rows.begin - 1, 0) >> shift], starts[((rows.end - 1) >> shift) + 1]};
  }

  template <typename C>
  void build(const PointSampleProblem& problem, const Level& level, const C* coordinates, const int64_t* rows,
             int64_t row_count, int64_t element_size, bool lines_wanted) {
    points.resize(row_count * problem.points);
    constexpr int64_t kGroups = 1 << 20;
    for (shift = 0; (level.height - 1) >> shift >= kGroups;) ++shift;
    const int64_t outside = ((level.height - 1) >> shift) + 1;
    starts.assign(outside + 2, 0);
    const C scale_x = static_cast<C>(level.scale_x), scale_y = static_cast<C>(level.scale_y);
    const auto each = [&](auto&& body) {
      for (int64_t i = 0; i < row_count; ++i) {
        for (int64_t n = rows[i] * problem.points, end = n + problem.points; n < end; ++n) {
          const auto x = axis_taps(coordinates[2 * n], scale_x, level.width, problem.how);
          const auto y = axis_taps(coordinates[2 * n + 1], scale_y, level.height, problem.how);
          const bool there = (x.has_first || x.has_second) && (y.has_first || y.has_second);
          body(n, there ? int64_t(std::max(y.first, 0)) >> shift : outside, x, y);
        }
      }
    };
    each([&](int64_t, int64_t group, auto, auto) { ++starts[group + 1]; });
    for (int64_t group = 0; group <= outside; ++group) starts[group + 1] += starts[group];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    std::vector<bool> read(lines_wanted ? level.pixels() * element_size / kLine + 1 : 0);
    each([&](int64_t n, int64_t group, auto x, auto y) {
      PlannedPoint<A>& point = points[next[group]++];
      const auto taps = make_taps(x, y, level.width);
      point.place = problem.place(n);
      for (int i = 0; i < 4; ++i) {
        point.pixels[i] = taps.pixels[i];
        point.weights[i] = static_cast<A>(taps.weights[i]);
        if (lines_wanted && taps.pixels[i] >= 0) read[taps.pixels[i] * element_size / kLine] = true;
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
    parallel_for(0, plans.size(), 1, [&](int64_t begin, int64_t end) {
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

// Calls make()(piece) for all pieces, make() once for many.
template <typename Make>
void run(const std::vector<Piece>& pieces, const Make& make) {
  parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
    auto work = make();
    for (; begin < end; ++begin) work(pieces[begin], begin + 1 < end ? &pieces[begin + 1] : nullptr);
  });
}
