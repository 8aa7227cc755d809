// Any number of channels: a matrix product of queries and points, compared with what each query still needs while it
// is in the first-level cache.

// Rows spread over a cloud, whose scores suggest a limit to start from: it is confirmed, or the query is searched again.
template <typename T>
struct Sample {
  static constexpr int64_t size = 240;

  Panels<T> panels;
  int64_t rank;  // in the sample: rarely reached by fewer points of the cloud than wanted

  static std::optional<Sample> of(const Search<T>& search, const Frame<T>& frame, const Panels<T>& points) {
    const double expected = double(search.wanted()) * size / search.points;
    const int64_t rank = static_cast<int64_t>(expected + 3 * std::sqrt(expected) + 2);
    const bool worthwhile = search.points >= 8 * size && expected >= 5 && rank <= size / 2;
    for (int64_t i = 0; i < search.points; ++i) {
      if (!worthwhile || !points.there(i)) return std::nullopt;
    }
    std::vector<T> rows(size * search.channels());
    for (int64_t i = 0; i < size; ++i) {
      double place = i * 0.6180339887498949;  // multiples of the golden ratio have no period
      place -= std::floor(place);
      std::copy_n(search.point_at(static_cast<int64_t>(place * search.points)), search.channels(),
                  rows.begin() + i * search.channels());
    }
    Sample sample{Panels<T>(search, Scores::products, frame, rows.data(), size), rank};
    sample.panels.pack_all();
    return sample;
  }
};

// Exact distances of panels' rows, as Selection asks for them.
template <typename T>
class PanelDistances {
 public:
  const Search<T>& search;
  const Frame<T>& frame;
  const Panels<T>&queries, &points;
  const Scores scores;
  const std::optional<Sample<T>> sample;

  PanelDistances(const Search<T>& search, const Frame<T>& frame, const Panels<T>& queries, const Panels<T>& points)
      : search(search),
        frame(frame),
        queries(queries),
        points(points),
        scores(points.scores),
        sample(scores == Scores::products ? Sample<T>::of(search, frame, points) : std::nullopt),
        tiny_((points.channels + 16) * std::ldexp(frame.scale * frame.scale, -1072)),
        longest_(*std::max_element(points.lengths.begin(), points.lengths.end())),
        left_(std::max(kExactAtLeast, search.queries * search.points / kPairsPerExact)),
        rows_(search.point, search.point + (worth_converting(search) ? search.points * search.channels() : 0)),
        in_double_{search.problem, search.queries, search.points, rows_.data(), rows_.data(), nullptr, nullptr, 0, 1},
        limits_(scores == Scores::exact ? queries.count * queries.width : 0, {0, -1}) {}

  int64_t index(int32_t position) const { return position; }

  // Exact distances cost as much as many scores do. Where scores leave too much to them there are better ones.
  void spend(int64_t count) { left_.fetch_sub(count, std::memory_order_relaxed); }
  bool gives_up() const { return scores != Scores::exact && left_.load(std::memory_order_relaxed) < 0; }

  // The limits of a panel of queries, to which points from `first` on are compared. Exact scores that reach one with a
  // higher index than the point that it is from do not count: `raised` has room for limits without them.
  const T* limits(const T* limits, int64_t query, int64_t first, T* raised) const {
    if (scores != Scores::exact) return limits;
    for (int64_t r = 0; r < points.width; ++r) {
      const Found& found = limits_[query + r];
      const bool above = limits[r] == -found.distance && 0 <= found.index && found.index < first;
      raised[r] = above ? std::nextafter(limits[r], std::numeric_limits<T>::infinity()) : limits[r];
    }
    return raised;
  }

  T uncertainty(int64_t q, T least, const T* scores, const int32_t* indices, int64_t count) const {
    using V = Vec<T>;
    if (this->scores != Scores::products) return uncertainty_of(least);
    V longest(T(0));
    int64_t i = 0;
    for (; i + V::size <= count; i += V::size) {
      const V lengths = gather(points.lengths.data(), load_indices<T>(indices + i));
      longest = max_or_second(V(load(scores + i).lanes >= V(least).lanes ? lengths.lanes : longest.lanes), longest);
    }
    T length = largest_of(longest);
    for (; i < count; ++i) length = std::max(length, scores[i] >= least ? points.lengths[indices[i]] : T(0));
    return uncertainty_up_to(length, q);
  }
  T most_uncertain(int64_t q, T least) const {
    return scores == Scores::products ? uncertainty_up_to(longest_, q) : uncertainty_of(least);
  }

  void find(int64_t q, const int32_t* indices, int64_t count, Found* found) const {
    if (rows_.empty()) find_exactly(search, search.query_at(q), indices, count, found);
    else find_exactly(in_double_, in_double_.query_at(q), indices, count, found);
  }

  T decided(int64_t q, const Found& found) {
    if (scores == Scores::exact) {
      limits_[q] = found;
      return static_cast<T>(-found.distance);
    }
    if (scores == Scores::differences) {
      const T score = static_cast<T>(-found.distance * frame.scale * frame.scale);
      return score - uncertainty_of(score);
    }
    const double square = static_cast<double>(queries.lengths[q]) * queries.lengths[q];
    const double distance = found.distance * frame.scale * frame.scale;
    const double score = search.problem.inner ? -distance : (square - distance) / 2;
    const double size = square + std::abs(distance);
    return static_cast<T>(score - points.slack * size - rounding(size)) - std::numeric_limits<T>::min();
  }

 private:
  // One exact distance for so many pairs of the search, and so many at least.
  static constexpr int64_t kPairsPerExact = 128, kExactAtLeast = 4096;

  // A point is converted once in place of whenever it is near, where it is near to many and all stay in the caches.
  static bool worth_converting(const Search<T>& search) {
    constexpr int64_t cached = (320 << 10) / sizeof(double);
    return std::is_same_v<T, float> && search.searches_itself() && search.wanted() >= 8 &&
           search.points * search.channels() <= cached;
  }

  // For scores that are no products.
  T uncertainty_of(T least) const {
    if (scores == Scores::exact) return 0;
    return 4 * points.slack * std::abs(least) + 64 * points.channels * std::numeric_limits<T>::min();
  }

  // The uncertainty for points of at most this length.
  T uncertainty_up_to(T length, int64_t q) const {
    const T sum = queries.lengths[q] + (search.problem.inner ? T(0) : length);
    return 2 * points.slack * length * sum + static_cast<T>(rounding(double(sum) * sum)) +
           4 * std::numeric_limits<T>::min();
  }

  // The error of exact distances of this size, which are rounded too and may underflow.
  double rounding(double size) const { return (points.channels + 16) * 0x1p-52 * size + tiny_; }

  const double tiny_;
  const T longest_;
  std::atomic<int64_t> left_;  // exact distances
  const Scratch<double> rows_;  // in float64, or none
  const Search<double> in_double_;
  std::vector<Found> limits_;  // the point that an exact limit is from; no index where there is none
};

// Gives products of panels to queries as candidates.
template <typename T>
class PanelSearch {
  using V = Vec<T>;
  static constexpr int64_t width = Panels<T>::width;

 public:
  PanelSearch(PanelDistances<T>& exact, Candidates<T>& candidates)
      : exact_(exact),
        candidates_(candidates),
        selection_(exact.search, exact, candidates),
        compute_(computation(exact.scores, exact.search.problem.inner)) {}

  void start(int64_t panel) {
    using Limits = std::numeric_limits<T>;
    const T least = exact_.scores == Scores::exact ? -Limits::infinity() : -Limits::max();
    for (int64_t q = panel * width; q < (panel + 1) * width; ++q) {
      candidates_.clear(q, exact_.queries.there(q) ? least : Limits::infinity());
    }
    if (exact_.sample) guess(panel);
  }

  void compare(int64_t queries, int64_t points) {
    if (exact_.gives_up()) return;
    compute_all(queries, exact_.points, points);
    give(queries, points, products_);
  }

  // Gives the products of two panels of one cloud to the rows of both.
  void compare_both(int64_t a, int64_t b) {
    compare(a, b);
    if (a == b || exact_.gives_up()) return;
    alignas(64) T transposed[width * width];
    for (int64_t r = 0; r < width; r += V::size) {
      for (int64_t c = 0; c < width; c += V::size) {
        transpose(products_ + r * width + c, width, transposed + c * width + r);
      }
    }
    give(b, a, transposed);
  }

  void finish(int64_t panel) {
    const int64_t end = std::min((panel + 1) * width, exact_.search.queries);
    for (int64_t q = panel * width; q < end && !exact_.gives_up(); ++q) selection_.finish(q, q);
  }

 private:
  using Computation = void (*)(const T* queries, const T* points, int64_t channels, T* to, int64_t to_row);

  static Computation computation(Scores scores, bool inner) {
    if (scores == Scores::products) return multiply<kVectors, T>;
    if constexpr (std::is_same_v<T, float>) return subtract<T>;  // float64 has exact ones for the same time
    else return inner ? measure<true, T> : measure<false, T>;
  }

  void compute_all(int64_t queries, const Panels<T>& points, int64_t panel) {
    for (int64_t r = 0; r < width; r += kRows<T>) {
      compute_(exact_.queries.panel(queries) + r, points.panel(panel), points.channels, products_ + r * width, width);
    }
  }

  void guess(int64_t queries) {
    const Panels<T>& sample = exact_.sample->panels;
    const int64_t length = sample.count * width, rank = exact_.sample->rank, row = length + V::size;
    std::vector<T> scores(width * row);
    for (int64_t p = 0; p < sample.count; ++p) {
      compute_all(queries, sample, p);
      for (int64_t r = 0; r < width; ++r) {
        for (int64_t v = 0; v < kVectors; ++v) {
          const V error(exact_.queries.errors[queries * width + r]);
          store(&scores[r * row + p * width + v * V::size], score(sample, p, r, v, error, products_));
        }
      }
    }
    for (int64_t r = 0; r < width; ++r) {
      const int64_t q = queries * width + r;
      if (!exact_.queries.there(q)) continue;
      candidates_.clear_and_guess(q, limit_reached_by(&scores[r * row], length, rank, rank + rank / 8).first);
    }
  }

  // The scores in vector v of row r of the products with a panel.
  static PAPER_LAYERS_INLINE V score(const Panels<T>& points, int64_t panel, int64_t r, int64_t v, V error,
                                     const T* products) {
    const int64_t at = panel * width + v * V::size;
    return load(products + r * width + v * V::size) +
           multiply_add(error, load(&points.lengths[at]), load(&points.offsets[at]));
  }

  void give(int64_t queries, int64_t points, const T* products) {
    if (exact_.sample) give_many(queries, points, products);
    else give_few(queries, points, products);
  }

  // Where most vectors hold candidates.
  __attribute__((noinline)) void give_many(int64_t queries, int64_t points, const T* products) {
    const T *errors = &exact_.queries.errors[queries * width], *limits = &candidates_.limit(queries * width);
    for (int64_t r = 0; r < width; ++r) {
      const int64_t q = queries * width + r;
      T* scores = candidates_.scores(q);
      int32_t* indices = candidates_.indices(q);
      int64_t n = candidates_.count(q);
#pragma GCC unroll 3
      for (int64_t v = 0; v < kVectors; ++v) {
        const V near = score(exact_.points, points, r, v, V(errors[r]), products);
        n = append(scores, indices, n, near, indices_from<T>(points * width + v * V::size),
                   lanes_not_below(near, V(limits[r])));
      }
      candidates_.count(q) = n;
      if (candidates_.full(q)) selection_.shrink(q);
    }
  }

  // Branches on what rarely is near would mostly be mispredicted: a list of vectors that hold candidates comes first.
  __attribute__((noinline)) void give_few(int64_t queries, int64_t points, const T* products) {
    struct Near {
      uint32_t lanes, place;
    } near[width * kVectors];
    T raised[width];
    const T *errors = &exact_.queries.errors[queries * width],
            *limits = exact_.limits(&candidates_.limit(queries * width), queries * width, points * width, raised);
    const auto score_of = [&](int64_t r, int64_t v) __attribute__((always_inline)) {
      return score(exact_.points, points, r, v, V(errors[r]), products);
    };
    int64_t count = 0;
    for (int64_t r = 0; r < width; ++r) {
#pragma GCC unroll 3
      for (int64_t v = 0; v < kVectors; ++v) {
        const uint32_t lanes = lanes_not_below(score_of(r, v), V(limits[r]));
        near[count] = {lanes, static_cast<uint32_t>(r * kVectors + v)};
        count += lanes != 0;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = near[i].place / kVectors, v = near[i].place % kVectors, q = queries * width + r;
      int64_t& n = candidates_.count(q);
      n = append(candidates_.scores(q), candidates_.indices(q), n, score_of(r, v),
                 indices_from<T>(points * width + v * V::size), near[i].lanes);
      if (candidates_.full(q)) selection_.shrink(q);
    }
  }

  PanelDistances<T>& exact_;
  Candidates<T>& candidates_;
  Selection<T, PanelDistances<T>> selection_;
  const Computation compute_;
  alignas(64) T products_[width * width];
};

