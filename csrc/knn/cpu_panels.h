// Any number of channels: a matrix product of queries and points that is compared with what each query still needs
// while it is in registers.
//
// With coordinates from a middle of the cloud, x . y - |y|^2 / 2 orders the points of a query x as their distances do.
// It is computed in T, in error by at most slack |y| (|x| + |y|), so what may be among the nearest is kept, and exact
// distances decide in the end. Coordinates are scaled so that nothing overflows.

// Registers hold kRows x kVectors vectors of the product; a panel is kVectors vectors of points.
constexpr int64_t kRows = PAPER_LAYERS_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int64_t kVectors = 3;
// Elements of points that stay in the second-level cache while queries pass by.
constexpr int64_t kPointElements = 32768;
// Queries that one thread takes at once.
constexpr int64_t kQueryBlock = 64;

// The points of a cloud in panels: channel by channel, the numbers of all the panel's points.
template <typename T>
struct Panels {
  using V = Vec<T>;
  static constexpr int64_t width = kVectors * V::size;

  int64_t channels, count;
  std::vector<double> center;
  double scale = 1;
  Scratch<T> values, starts;  // starts: -|y|^2 / 2, or -infinity for what is nobody's neighbour
  std::vector<T> lengths;     // the largest |y| of each panel

  explicit Panels(const Search<T>& search)
      : channels(search.channels()), count((search.points + width - 1) / width), center(channels), values(count * width * channels), starts(count * width), lengths(count) {
    if (!search.problem.inner) find_center(search);
    find_scale(search);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) pack(search, panel);
    });
  }

  T coordinate(const T* row, int64_t c) const { return static_cast<T>((row[c] - center[c]) * scale); }

 private:
  // The median of a sample: a far point does not move it.
  void find_center(const Search<T>& search) {
    std::vector<double> sample;
    const int64_t step = search.points / 64 + 1;
    for (int64_t c = 0; c < channels; ++c) {
      sample.clear();
      for (int64_t j = 0; j < search.points; j += step) {
        const double x = search.point_at(j)[c];
        if (std::isfinite(x)) sample.push_back(x);
      }
      if (sample.empty()) continue;
      std::nth_element(sample.begin(), sample.begin() + sample.size() / 2, sample.end());
      center[c] = sample[sample.size() / 2];
    }
  }

  void find_scale(const Search<T>& search) {
    double largest = 0;
    const auto look_at = [&](const T* rows, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t c = 0; c < channels; ++c) {
          const double x = std::abs(rows[i * channels + c] - center[c]);
          if (x > largest) largest = x;
        }
      }
    };
    look_at(search.point, search.points);
    if (search.query != search.point) look_at(search.query, search.queries);
    if (largest > 0) scale = std::ldexp(1.0, std::min(-std::ilogb(largest), 500));  // its square is finite
  }

  void pack(const Search<T>& search, int64_t panel) {
    T* to = values.data() + panel * width * channels;
    double longest = 0;
    for (int64_t p = 0; p < width; ++p) {
      const int64_t j = panel * width + p;
      double square = j < search.points ? 0 : std::numeric_limits<double>::quiet_NaN();
      for (int64_t c = 0; c < channels; ++c) {
        const T x = j < search.points ? coordinate(search.point_at(j), c) : T(0);
        to[c * width + p] = x;
        square += static_cast<double>(x) * x;
      }
      if (std::isnan(square)) {
        for (int64_t c = 0; c < channels; ++c) to[c * width + p] = 0;
        starts[panel * width + p] = -std::numeric_limits<T>::infinity();
        continue;
      }
      longest = std::max(longest, square);
      starts[panel * width + p] = search.problem.inner ? T(0) : static_cast<T>(-square / 2);
    }
    lengths[panel] = static_cast<T>(std::sqrt(longest));
  }
};

// The neighbours of a block of queries.
template <typename T>
class PanelSearch {
  using V = Vec<T>;
  static constexpr int64_t width = Panels<T>::width;

 public:
  PanelSearch(const Search<T>& search, const Panels<T>& panels)
      : search_(search),
        panels_(panels),
        channels_(panels.channels),
        wanted_(search.wanted()),
        capacity_(2 * wanted_ + width / 2 + width),
        slack_((channels_ + 8) * std::numeric_limits<T>::epsilon()),
        values_(kQueryBlock * channels_),
        lengths_(kQueryBlock),
        squares_(kQueryBlock),
        counts_(kQueryBlock),
        limits_(kQueryBlock),
        candidates_(kQueryBlock * capacity_),
        scores_(capacity_ + V::size),
        found_(capacity_) {}

  void run(Range queries) {
    queries_ = queries;
    for (int64_t q = 0; q < kQueryBlock; ++q) {
      // Rows without a query repeat the first one and look for nothing.
      const bool there = q < queries.size();
      const T* row = search_.query_at(queries.begin + (there ? q : 0));
      double square = 0;
      for (int64_t c = 0; c < channels_; ++c) {
        const T x = panels_.coordinate(row, c);
        values_[(q / kRows * channels_ + c) * kRows + q % kRows] = x;
        square += static_cast<double>(x) * x;
      }
      squares_[q] = square;
      lengths_[q] = static_cast<T>(std::sqrt(square));
      limits_[q] = there ? -std::numeric_limits<T>::max() : std::numeric_limits<T>::infinity();
      counts_[q] = 0;
    }
    const int64_t block = std::max<int64_t>(1, kPointElements / (width * channels_));
    const int64_t groups = (queries.size() + kRows - 1) / kRows;
    for (int64_t first = 0; first < panels_.count; first += block) {
      const int64_t last = std::min(panels_.count, first + block);
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t panel = first; panel < last; ++panel) multiply(panel, g * kRows);
      }
    }
    for (int64_t q = 0; q < queries.size(); ++q) {
      if (counts_[q] > wanted_ + wanted_ / 8) shrink(q);
      exact(q);
      write_neighbours(search_, queries.begin + q, found_.data(), counts_[q]);
    }
  }

 private:
  struct Candidate {
    T score;  // rounded
    int32_t index;
  };

  // How far a rounded score of a panel's points may be off.
  T error(int64_t q, int64_t panel) const {
    const T length = panels_.lengths[panel];
    return slack_ * length * (lengths_[q] + (search_.problem.inner ? T(0) : length)) + std::numeric_limits<T>::min();
  }

  // A panel for kRows queries.
  void multiply(int64_t panel, int64_t first) {
    alignas(64) T scores[kRows * width];
    product(panels_.starts.data() + panel * width, panels_.values.data() + panel * width * channels_,
            values_.data() + first * channels_, channels_, scores);
    T limits[kRows];
    for (int64_t r = 0; r < kRows; ++r) limits[r] = limits_[first + r] - error(first + r, panel);
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t q = first + r;
      const V limit(limits[r]);
      uint64_t near = 0;
#pragma GCC unroll 3
      for (int64_t v = 0; v < kVectors; ++v) {
        const V score = load(scores + r * width + v * V::size);
        near |= static_cast<uint64_t>(lanes_set(score.lanes > limit.lanes)) << (v * V::size);
      }
      if (near != 0) keep(q, panel, scores + r * width, near);
    }
  }

  // A function of its own, so that the compiler keeps all sums in registers.
  static __attribute__((noinline)) void product(const T* starts, const T* points, const T* queries, int64_t channels,
                                                T* scores) {
    V sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] = load(starts + v * V::size);
    }
    for (int64_t c = 0; c < channels; ++c) {
      V y[kVectors];
#pragma GCC unroll 3
      for (int64_t v = 0; v < kVectors; ++v) y[v] = load(points + c * width + v * V::size);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) {
        const V x(queries[c * kRows + r]);
#pragma GCC unroll 3
        for (int64_t v = 0; v < kVectors; ++v) sums[r][v] = multiply_add(x, y[v], sums[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int64_t v = 0; v < kVectors; ++v) store(scores + r * width + v * V::size, sums[r][v]);
    }
  }

  void keep(int64_t q, int64_t panel, const T* scores, uint64_t near) {
    Candidate* to = candidates_.data() + q * capacity_;
    int64_t n = counts_[q];
    for (; near != 0; near &= near - 1) {
      const int64_t lane = __builtin_ctzll(near);
      to[n++] = {scores[lane], static_cast<int32_t>(panel * width + lane)};
    }
    counts_[q] = n;
    if (n >= wanted_ && (n > capacity_ - width || limits_[q] == -std::numeric_limits<T>::max())) shrink(q);
  }

  // Keeps those that may be among the nearest, and limits what may come.
  void shrink(int64_t q) {
    Candidate* first = candidates_.data() + q * capacity_;
    // By the least that a score may be, so that as many are surely as near as the limit; smaller is nearer in rank.
    for (int64_t i = 0; i < counts_[q]; ++i) scores_[i] = error(q, first[i].index / width) - first[i].score;
    raise(q, -value_of_rank(scores_.data(), counts_[q], wanted_ - 1));
    int64_t kept = 0;
    for (int64_t i = 0; i < counts_[q]; ++i) {
      first[kept] = first[i];
      kept += first[i].score + error(q, first[i].index / width) >= limits_[q];
    }
    counts_[q] = kept;
    if (kept <= capacity_ - width) return;
    // Too many are equally near: their exact distances and indices decide.
    exact(q);
    std::nth_element(found_.begin(), found_.begin() + wanted_ - 1, found_.begin() + kept);
    counts_[q] = wanted_;
    for (int64_t i = 0; i < wanted_; ++i) first[i] = {score(q, found_[i].distance), found_[i].index};
    raise(q, score(q, found_[wanted_ - 1].distance) - std::numeric_limits<T>::epsilon() * static_cast<T>(squares_[q]));
  }

  void raise(int64_t q, T limit) { limits_[q] = std::max(limits_[q], limit); }

  T score(int64_t q, double distance) const {
    const double scaled = distance * panels_.scale * panels_.scale;
    return static_cast<T>(search_.problem.inner ? -scaled : (squares_[q] - scaled) / 2);
  }

  // Fills found_ with a query's candidates.
  void exact(int64_t q) {
    const Candidate* from = candidates_.data() + q * capacity_;
    const T* x = search_.query_at(queries_.begin + q);
    for (int64_t i = 0; i < counts_[q]; ++i) {
      found_[i] = {exact_distance(x, search_.point_at(from[i].index), channels_, search_.problem.inner), from[i].index};
    }
  }

  const Search<T>& search_;
  const Panels<T>& panels_;
  const int64_t channels_, wanted_, capacity_;
  const T slack_;
  Range queries_;
  Scratch<T> values_;
  std::vector<T> lengths_;
  std::vector<double> squares_;
  std::vector<int64_t> counts_;
  std::vector<T> limits_;
  std::vector<Candidate> candidates_;
  Scratch<T> scores_;
  std::vector<Found> found_;
};

template <typename T>
void search_panels(const Search<T>& search) {
  const Panels<T> panels(search);
  const int64_t blocks = (search.queries + kQueryBlock - 1) / kQueryBlock;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    PanelSearch<T> block(search, panels);
    for (int64_t b = begin; b < end; ++b) {
      block.run({b * kQueryBlock, std::min(search.queries, (b + 1) * kQueryBlock)});
    }
  });
}
