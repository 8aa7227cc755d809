// A cloud's rows in panels, for matrix products, compiled once for each instruction set.
//
// With coordinates from a middle of the cloud, x . y - |y|^2 / 2 orders the points of a query x as their distances do.
// It is computed in T, in error by at most slack |y| (|x| + |y|). Coordinates are scaled so that nothing overflows.

// Where the coordinates of a cloud start, and their unit.
template <typename T>
class Frame {
  using V = Vec<T>;

 public:
  double scale = 1;  // a power of two; its square is finite

  Frame(const Search<T>& search, Scores scores)
      : center_((search.channels() + V::size - 1) / V::size * V::size, T(0)), scale_(1) {
    if (scores == Scores::exact) return;
    if (scores == Scores::products && !search.problem.inner) find_center(search);
    T largest = half_largest(search.point, search.points, search.channels());
    if (!search.searches_itself()) {
      largest = std::max(largest, half_largest(search.query, search.queries, search.channels()));
    }
    constexpr int least = std::is_same_v<T, float> ? -126 : -500, most = -least;
    if (largest > 0) scale = std::ldexp(1.0, std::min(std::max(-std::ilogb(largest) - 1, least), most));
    scale_ = static_cast<T>(scale);
    for (T& x : center_) x *= scale_;
  }

  // Scaled before they are subtracted, as differences may overflow.
  T coordinate(const T* row, int64_t c) const { return row[c] * scale_ - center_[c]; }
  // Several, from channel c on.
  PAPER_LAYERS_INLINE V coordinates(const T* row, int64_t c) const {
    return load(row + c) * V(scale_) - load(&center_[c]);
  }

 private:
  // The median of a few rows: a far point does not move it.
  void find_center(const Search<T>& search) {
    constexpr int64_t count = 15;
    for (int64_t c = 0; c < search.channels(); c += V::size) {
      const int64_t here = std::min(V::size, search.channels() - c);
      V sorted[count];
      for (int64_t i = 0; i < count; ++i) {
        const T* const from = search.point_at(i * (search.points - 1) / (count - 1)) + c;
        const V x = here == V::size ? load(from) : load(from, here);
        sorted[i] = V(x.lanes - x.lanes == 0 ? x.lanes : V(T(0)).lanes);  // finite
        for (int64_t j = i; j > 0; --j) {
          const V low = min_or_second(sorted[j], sorted[j - 1]);
          sorted[j] = max_or_second(sorted[j], sorted[j - 1]);
          sorted[j - 1] = low;
        }
      }
      store(&center_[c], sorted[count / 2]);
    }
  }

  // Half of the largest coordinate, other than NaN: the whole may overflow.
  T half_largest(const T* rows, int64_t count, int64_t channels) const {
    V largest(T(0));
    T single = 0;
    for (int64_t i = 0; i < count; ++i) {
      const T* const row = rows + i * channels;
      int64_t c = 0;
      for (; c + V::size <= channels; c += V::size) {
        const V x = load(row + c) * V(T(0.5)) - load(&center_[c]) * V(T(0.5));
        largest = max_or_second(max_or_second(x, V(-x.lanes)), largest);
      }
      for (; c < channels; ++c) {
        const T x = std::abs(row[c] / 2 - center_[c] / 2);
        single = x > single ? x : single;
      }
    }
    return std::max(single, largest_of(largest));
  }

  Scratch<T> center_;  // in this unit
  T scale_;
};

// The rows of a cloud in panels: channel by channel, the numbers of all the panel's rows.
template <typename T>
class Panels {
  using V = Vec<T>;

 public:
  static constexpr int64_t width = kWidth<T>;

  const Scores scores;
  const int64_t channels, rows, count;
  const T slack;
  Scratch<T> lengths, errors;  // times a point's length: the error of a score
  // A point's part of the scores: for products -|y|^2 / 2 and the error, else 0. A point that is never a neighbour has
  // -infinity, or NaN where infinitely far points have -infinity.
  Scratch<T> offsets;

  // Panels to be packed.
  Panels(const Search<T>& search, Scores scores, const Frame<T>& frame, const T* data, int64_t rows)
      : scores(scores),
        channels(search.channels()),
        rows(rows),
        count((rows + width - 1) / width),
        slack((channels + 8) * std::numeric_limits<T>::epsilon()),
        lengths(count * width),
        errors(count * width),
        offsets(count * width),
        inner_(search.problem.inner),
        frame_(frame),
        data_(data),
        values_(count * width * channels) {}

  void pack(int64_t panel) {
    for (int64_t first = panel * width; first < (panel + 1) * width; first += V::size) pack_rows(first);
  }
  void pack_all() {
    for (int64_t p = 0; p < count; ++p) pack(p);
  }

  const T* panel(int64_t p) const { return values_.data() + p * width * channels; }
  bool there(int64_t row) const { return offsets[row] > -std::numeric_limits<T>::infinity(); }
  // The vectors, and the rows in whole numbers of kRows, that are not empty.
  int64_t vectors(int64_t p) const { return (std::min(width, rows - p * width) + V::size - 1) / V::size; }
  int64_t used_rows(int64_t p) const {
    return (std::min(width, rows - p * width) + kRows<T> - 1) / kRows<T> * kRows<T>;
  }

 private:
  // A vector of rows.
  void pack_rows(int64_t first) {
    constexpr int64_t size = V::size;
    const int64_t here = std::min(std::max<int64_t>(rows - first, 0), size);
    T* const to = values_.data() + first / width * width * channels + first % width;
    double squares[size] = {};
    int64_t c = 0;
    for (; here == size && c + size <= channels; c += size) {
      alignas(64) T block[size * size];
      for (int64_t i = 0; i < size; ++i) store(block + i * size, frame_.coordinates(data_ + (first + i) * channels, c));
      transpose(block, size, block);
      for (int64_t i = 0; i < size; ++i) {
        const T* const x = block + i * size;
        store(to + (c + i) * width, load(x));
        for (int64_t r = 0; r < size; ++r) squares[r] += static_cast<double>(x[r]) * x[r];
      }
    }
    for (int64_t r = 0; r < here; ++r) {
      const T* const row = data_ + (first + r) * channels;
      for (int64_t i = c; i < channels; ++i) {
        const T x = to[i * width + r] = frame_.coordinate(row, i);
        squares[r] += static_cast<double>(x) * x;
      }
    }
    for (int64_t r = 0; r < size; ++r) {
      measure_row(first + r, r < here ? squares[r] : std::numeric_limits<double>::quiet_NaN(), to + r);
    }
  }

  void measure_row(int64_t i, double square, T* to) {
    if (std::isnan(square)) {
      using Limits = std::numeric_limits<T>;
      for (int64_t c = 0; i < rows && c < channels; ++c) to[c * width] = 0;
      offsets[i] = scores == Scores::exact ? Limits::quiet_NaN() : -Limits::infinity();
      return;
    }
    if (scores != Scores::products) return;
    lengths[i] = static_cast<T>(std::sqrt(square));
    errors[i] = slack * lengths[i];
    offsets[i] = static_cast<T>(inner_ ? 0 : (slack - 0.5) * square) + std::numeric_limits<T>::min();
  }

  const bool inner_;
  const Frame<T>& frame_;
  const T* const data_;
  Scratch<T> values_;
};
