// Sums of weights and of weighted values over windows, compiled once for each instruction set.
//
// Both layouts are rows of pixels of `depth` elements: 1 in NCHW, all channels in channels_last. A weight is
// e^l 2^-k with one exponent k for a block of rows, so each exponential is computed once, and windows are
// sums over rows, then over columns. A window whose weights all lie far below its block's largest (its sum is
// under kSmallestSum, or NaN) is done again by itself, relative to its own largest logit.

// Sums below this have lost precision to weights that underflowed; above it at most 2^-46 of the sum.
constexpr double kSmallestSum = 0x1p-80;
// Logits beyond this are left to the windows' own computation: e^l 2^-k would not be precise.
constexpr double kLargestLogit = 16384;
// The exponents of blocks without a finite logit, and of blocks left to the windows' own computation.
constexpr int64_t kNoExponent = -(int64_t(1) << 30), kLeftExponent = int64_t(1) << 30;
// Elements in a block of weights and in a row of a tile: they share the second-level cache.
constexpr int64_t kBlockElements = 8192;
constexpr int64_t kTileElements = 4096;
// Gradients of more than this are written past the caches, which they would leave before they are read.
constexpr int64_t kStreamingBytes = int64_t(8) << 20;

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
A power_of_two(int64_t exponent) {
  return exponent < -126 ? A(0) : static_cast<A>(std::ldexp(1.0, static_cast<int>(exponent)));
}

// Rows of weights over some columns, a sliding block at a time.
template <typename T>
class Weights {
  using A = Accumulator<T>;
  using V = Vec<A>;

 public:
  Weights(const LipPool2dProblem& problem, Range columns)
      : height_(problem.height.length),
        columns_(columns),
        depth_(problem.depth()),
        row_elements_(columns.size() * depth_),
        capacity_(std::min(height_, std::max(problem.height.kernel + 1, kBlockElements / row_elements_))),
        weights_(capacity_ * row_elements_ + V::size),
        pixel_weights_(problem.logit_depth() != depth_ ? columns.size() + V::size : 0),
        exponents_(capacity_) {}

  // `input` is only fetched ahead of its use, as are the logits.
  void begin(Plane<const T> logit, Plane<const T> input) {
    logit_ = logit;
    input_ = input;
    rows_ = {0, 0};
  }

  // Make these rows available, and those after them that fit.
  void slide_to(Range rows) {
    if (rows.end <= rows_.end && rows.begin >= rows_.begin) return;
    const int64_t kept = rows.begin < rows_.begin ? 0 : std::max<int64_t>(0, rows_.end - rows.begin);
    if (kept > 0) {
      const int64_t dropped = rows.begin - rows_.begin;
      std::memmove(weights_.data(), row(rows.begin), kept * row_elements_ * sizeof(A));
      std::move(exponents_.begin() + dropped, exponents_.begin() + dropped + kept, exponents_.begin());
    }
    rows_ = {rows.begin, std::min(height_, rows.begin + capacity_)};
    compute({rows.begin + kept, rows_.end});
  }

  const A* row(int64_t r) const { return weights_.data() + (r - rows_.begin) * row_elements_; }
  A* row(int64_t r) { return weights_.data() + (r - rows_.begin) * row_elements_; }
  int64_t exponent(int64_t r) const { return exponents_[r - rows_.begin]; }
  int64_t row_elements() const { return row_elements_; }

 private:
  void compute(Range rows) {
    const bool whole_rows = columns_.size() == logit_.width;  // then all the rows are one run
    const int64_t runs = whole_rows ? 1 : rows.size();
    const int64_t run = columns_.size() * logit_.depth * (whole_rows ? rows.size() : 1);
    const auto start = [&](int64_t i) { return logit_.at(rows.begin + i, columns_.begin); };

    V largest_lanes(-std::numeric_limits<A>::infinity());
    for (int64_t i = 0; i < runs; ++i) {
      const T* l = start(i);
      int64_t j = 0;
      for (; j + V::size <= run; j += V::size) largest_lanes = max_or_second(load(l + j), largest_lanes);
      for (; j < run; ++j) {
        const A value = static_cast<A>(l[j]);
        if (value > largest_lanes.lanes[0]) largest_lanes.lanes[0] = value;
      }
    }
    A largest_logit = largest(largest_lanes);
    if (largest_logit > std::numeric_limits<A>::max()) {
      largest_logit = -std::numeric_limits<A>::infinity();
      for (int64_t i = 0; i < runs; ++i) {
        for (int64_t j = 0; j < run; ++j) {
          const A value = static_cast<A>(start(i)[j]);
          if (value <= std::numeric_limits<A>::max()) largest_logit = std::max(largest_logit, value);
        }
      }
    }
    const bool none = largest_logit < std::numeric_limits<A>::lowest();
    if (!none && std::abs(largest_logit) > A(kLargestLogit)) {
      // Nothing, of an exponent above all others: every window that takes part in it sums to zero.
      std::fill(exponents_.begin() + (rows.begin - rows_.begin), exponents_.begin() + (rows.end - rows_.begin), kLeftExponent);
      std::fill(row(rows.begin), row(rows.end), A(0));
      return;
    }
    const int64_t exponent = none ? 0 : static_cast<int64_t>(std::ceil(largest_logit * A(1.4426950408889634)));
    std::fill(exponents_.begin() + (rows.begin - rows_.begin), exponents_.begin() + (rows.end - rows_.begin),
              none ? kNoExponent : exponent);
    const ScaledExp<A> scaled_exp(exponent);
    if (logit_.depth == depth_) {
      const int64_t ahead = rows.size() * logit_.width * depth_;
      for (int64_t i = 0; i < runs; ++i) {
        const T *from = start(i), *next = from + ahead, *next_input = input_.at(rows.begin + i, columns_.begin) + ahead;
        A* to = row(rows.begin + i);
        cover<V::size>(run, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
          __builtin_prefetch(next + j, 0, 2);
          __builtin_prefetch(next_input + j, 0, 2);
          store(to + j, scaled_exp(load(from + j, lanes)), lanes);
        });
      }
      return;
    }
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const T* from = logit_.at(r, columns_.begin);
      cover<V::size>(columns_.size(), [&](int64_t j, auto lanes) __attribute__((always_inline)) {
        store(pixel_weights_.data() + j, scaled_exp(load(from + j, lanes)), lanes);
      });
      for (int64_t j = 0; j < columns_.size(); ++j) std::fill_n(row(r) + j * depth_, depth_, pixel_weights_[j]);
    }
  }

  const int64_t height_;
  const Range columns_;
  const int64_t depth_, row_elements_, capacity_;
  Plane<const T> logit_, input_;
  Range rows_;
  std::vector<A> weights_, pixel_weights_;
  std::vector<int64_t> exponents_;
};

// The first `fixed` elements of a vector as a copy that stays in registers; for 0, the vector itself.
template <typename T, int fixed>
struct Unrolled {
  T elements[fixed];
  explicit PAPER_LAYERS_INLINE Unrolled(const std::vector<T>& from) { std::copy_n(from.begin(), fixed, elements); }
  PAPER_LAYERS_INLINE const T& operator[](int64_t i) const { return elements[i]; }
};
template <typename T>
struct Unrolled<T, 0> {
  const T* elements;
  explicit Unrolled(const std::vector<T>& from) : elements(from.data()) {}
  const T& operator[](int64_t i) const { return elements[i]; }
};

// The sum of `count` vectors (`fixed`, where that is not 0) that start `stride` elements apart.
template <int fixed, typename A>
PAPER_LAYERS_INLINE Vec<A> sum_strided(const A* first, int64_t stride, int64_t count) {
  Vec<A> total = load(first);
#pragma GCC unroll 4
  for (int64_t i = 1; i < (fixed ? fixed : count); ++i) total = total + load(first + i * stride);
  return total;
}

// Scratch for the rows of one task: sums over the rows of windows, and over their columns.
template <typename T>
class Windows {
 public:
  using A = Accumulator<T>;
  using V = Vec<A>;

  Windows(const LipPool2dProblem& problem, Range outputs)
      : height_(problem.height),
        width_(problem.width),
        depth_(problem.depth()),
        outputs_(outputs),
        columns_(width_.taps(outputs)),
        weights_(problem, columns_),
        // Vectors of the sums over columns read past the last window, into elements of no consequence.
        weight_columns_(((outputs.size() - 1) * width_.stride + width_.kernel) * depth_ + 4 * V::size),
        value_columns_(weight_columns_.size()),
        weight_sums_(outputs.size() * depth_ + V::size),
        value_sums_(weight_sums_.size()),
        row_weights_(height_.kernel),
        row_values_(height_.kernel),
        row_scales_(height_.kernel) {}

  void begin(Plane<const T> logit, Plane<const T> input) {
    weights_.begin(logit, input);
    input_ = input;
  }

  Range columns() const { return columns_; }
  Range outputs() const { return outputs_; }
  const Weights<T>& weights() const { return weights_; }
  const A* weight_sums() const { return weight_sums_.data(); }
  const A* value_sums() const { return value_sums_.data(); }
  int64_t count() const { return outputs_.size() * depth_; }

  // Sums of the weights, and of weight times value if asked, over a row of windows; returns their exponent.
  template <bool values>
  int64_t sum(int64_t output_row) {
    const Range rows = height_.taps(output_row);
    weights_.slide_to(rows);
    int64_t exponent = kNoExponent;
    for (int64_t r = rows.begin; r < rows.end; ++r) exponent = std::max(exponent, weights_.exponent(r));
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      row_weights_[r - rows.begin] = weights_.row(r);
      row_values_[r - rows.begin] = input_.at(r, columns_.begin);
      row_scales_[r - rows.begin] = power_of_two<A>(weights_.exponent(r) - exponent);
    }
    switch (rows.size()) {
      case 2: sum_rows<values, 2>(2); break;
      case 3: sum_rows<values, 3>(3); break;
      default: sum_rows<values, 0>(rows.size());
    }
    sum_columns(weight_columns_.data(), weight_sums_.data());
    if constexpr (values) sum_columns(value_columns_.data(), value_sums_.data());
    return exponent;
  }

 private:
  // With `fixed` rows the loops over them unroll.
  template <bool values, int fixed>
  void sum_rows(int64_t rows) {
    const int64_t count = fixed ? fixed : rows;
    const Unrolled<const A*, fixed> weights(row_weights_);
    const Unrolled<const T*, fixed> inputs(row_values_);
    const Unrolled<A, fixed> scales(row_scales_);
    const int64_t left = (columns_.begin - width_.start(outputs_.begin)) * depth_;
    A* weight_out = weight_columns_.data() + left;
    A* value_out = value_columns_.data() + left;
    cover<V::size>(weights_.row_elements(), [&](int64_t j, auto lanes) __attribute__((always_inline)) {
      V weight_sum(A(0)), value_sum(A(0));
#pragma GCC unroll 4
      for (int64_t r = 0; r < count; ++r) {
        const V weight = load(weights[r] + j) * V(scales[r]);
        weight_sum = weight_sum + weight;
        if constexpr (values) value_sum = multiply_add(weight, load(inputs[r] + j, lanes), value_sum);
      }
      store(weight_out + j, weight_sum, lanes);
      if constexpr (values) store(value_out + j, value_sum, lanes);
    });
  }

  void sum_columns(const A* columns, A* sums) const {
    switch (width_.kernel) {
      case 2: return sum_columns<2>(columns, sums);
      case 3: return sum_columns<3>(columns, sums);
      default: return sum_columns<0>(columns, sums);
    }
  }

  template <int fixed>
  void sum_columns(const A* columns, A* sums) const {
    const int64_t kernel = fixed ? fixed : width_.kernel, stride = width_.stride, outputs = outputs_.size();
    if (depth_ > 1) {
      for (int64_t o = 0; o < outputs; ++o) {
        const A* pixel = columns + o * stride * depth_;
        cover<V::size>(depth_, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
          store(sums + o * depth_ + d, sum_strided<fixed>(pixel + d, depth_, kernel), lanes);
        });
      }
    } else if (stride == 1) {
      for (int64_t o = 0; o < outputs; o += V::size) store(sums + o, sum_strided<fixed>(columns + o, 1, kernel));
    } else if (stride == 2) {
      for (int64_t o = 0; o < outputs; o += V::size) {
        store(sums + o, even_lanes(sum_strided<fixed>(columns + 2 * o, 1, kernel),
                                   sum_strided<fixed>(columns + 2 * o + V::size, 1, kernel)));
      }
    } else {
      for (int64_t o = 0; o < outputs; ++o) {
        sums[o] = std::accumulate(columns + o * stride, columns + o * stride + kernel, A(0));
      }
    }
  }

  const Side height_, width_;
  const int64_t depth_;
  const Range outputs_, columns_;
  Plane<const T> input_;
  Weights<T> weights_;
  std::vector<A> weight_columns_, value_columns_, weight_sums_, value_sums_;
  std::vector<const A*> row_weights_;
  std::vector<const T*> row_values_;
  std::vector<A> row_scales_;
};
