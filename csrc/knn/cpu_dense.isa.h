// Clouds of few points, compiled once for each instruction set: all scores of a query at once, of which the largest are
// taken.

template <typename T>
class DenseSearch {
  using V = Vec<T>;
  static constexpr int64_t width = Panels<T>::width;

 public:
  // Where a cloud searches itself, products serve the rows of both panels, unless to compute them again is cheaper than
  // to transpose them. There are as many products at a time as fit into the caches.
  static bool is_symmetric(const Search<T>& search) { return search.searches_itself() && search.channels() >= 24; }

  static bool fits(const Search<T>& search) {
    constexpr int64_t cached = 9 << 19;
    const int64_t rows = is_symmetric(search) ? search.points + width : 512;
    return search.points <= 2048 && rows * (search.points + width) * int64_t(sizeof(T)) <= cached;
  }

  // `products` has room for products of all pairs if it is symmetric, else for those of a panel.
  DenseSearch(PanelDistances<T>& exact, T* products, bool symmetric)
      : exact_(exact),
        products_(products),
        symmetric_(symmetric),
        stride_(exact.points.count * width),
        used_((exact.points.rows + V::size - 1) / V::size * V::size),
        there_(count_there(exact.points)),
        candidates_(width, exact.search.wanted(), used_),
        selection_(exact.search, exact, candidates_) {}

  // The products of panel a with itself and those after it, and with their sides exchanged.
  void multiply_both(int64_t a) {
    const Panels<T>& points = exact_.points;
    T* const rows = products_ + a * width * stride_;
    for (int64_t r = 0; r < points.used_rows(a); r += kRows<T>) multiply_row(a, r, a, r / V::size, rows);
    for (int64_t b = a + 1; b < points.count; ++b) multiply_panels(a, b, rows);
    const int64_t vectors = (a + 1) * kVectors, all = (points.count - 1) * kVectors + points.vectors(points.count - 1);
    for (int64_t v = a * kVectors; v < std::min(vectors, all); ++v) {
      for (int64_t other = v + 1; other < all; ++other) {
        transpose(products_ + v * V::size * stride_ + other * V::size, stride_,
                  products_ + other * V::size * stride_ + v * V::size);
      }
    }
  }

  void finish(int64_t panel) {
    T* const rows = products_ + (symmetric_ ? panel * width * stride_ : 0);
    for (int64_t b = 0; b < exact_.points.count && !symmetric_; ++b) multiply_panels(panel, b, rows);
    candidates_.start_at(panel * width);
    const int64_t end = std::min((panel + 1) * width, exact_.search.queries);
    for (int64_t q = panel * width; q < end && !exact_.gives_up(); ++q) {
      choose(q, rows + (q - panel * width) * stride_);
      selection_.finish(q, q);
    }
  }

 private:
  static int64_t count_there(const Panels<T>& points) {
    int64_t count = 0;
    for (int64_t i = 0; i < points.rows; ++i) count += points.there(i);
    return count;
  }

  void multiply_panels(int64_t a, int64_t b, T* rows) const {
    for (int64_t r = 0; r < exact_.queries.used_rows(a); r += kRows<T>) multiply_row(a, r, b, 0, rows);
  }

  // The products of kRows rows with the vectors of a panel from one on.
  PAPER_LAYERS_INLINE void multiply_row(int64_t a, int64_t r, int64_t b, int64_t first, T* rows) const {
    const Panels<T>& points = exact_.points;
    const int64_t vectors = points.vectors(b) - first, column = first * V::size;
    const auto compute = vectors == 1 ? multiply<1, T> : vectors == 2 ? multiply<2, T> : multiply<3, T>;
    compute(exact_.queries.panel(a) + r, points.panel(b) + column, points.channels,
            rows + r * stride_ + b * width + column, stride_);
  }

  // Makes the largest scores candidates.
  void choose(int64_t q, T* row) {
    using Limits = std::numeric_limits<T>;
    candidates_.clear(q, Limits::infinity());
    if (!exact_.queries.there(q)) return;
    // Whole vectors, as they are sorted.
    const int64_t wanted = candidates_.wanted, most = (wanted + wanted / 4 + 3 + V::size) / V::size * V::size;
    const V error(exact_.queries.errors[q]), infinity(Limits::infinity()), none(-Limits::infinity());
    V least = infinity, largest = none;
    const T *const lengths = exact_.points.lengths.data(), *const offsets = exact_.points.offsets.data();
    const int64_t used = used_;
    for (int64_t i = 0; i < used; i += V::size) {
      const V score = load(row + i) + multiply_add(error, load(lengths + i), load(offsets + i));
      store(row + i, score);
      largest = max_or_second(score, largest);
      least = min_or_second(V(score.lanes == none.lanes ? infinity.lanes : score.lanes), least);
    }
    T limit = -Limits::max();
    if (there_ > most) {
      const T low = -largest_of(V(-least.lanes)), top = largest_of(largest);
      const T reached = limit_between(row, used, wanted, most, low, there_, top, share_);
      // Clouds are alike wherever one stands.
      if (top > low) share_ = (reached - low) / (top - low);
      limit = std::max(limit, reached - exact_.most_uncertain(q, reached));
    }
    candidates_.limit(q) = limit;
    T* const scores = candidates_.scores(q);
    int32_t* const indices = candidates_.indices(q);
    int64_t n = 0;
    for (int64_t i = 0; i < used; i += V::size) {
      const V score = load(row + i);
      n = append(scores, indices, n, score, indices_from<T>(i), lanes_not_below(score, V(limit)));
    }
    candidates_.count(q) = n;
  }

  PanelDistances<T>& exact_;
  T* const products_;
  const bool symmetric_;
  const int64_t stride_, used_, there_;
  Candidates<T> candidates_;
  Selection<T, PanelDistances<T>> selection_;
  T share_ = T(0.5);  // of the way from the lowest score to the highest one, where the last limit was
};
