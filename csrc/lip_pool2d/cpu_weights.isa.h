// Weights of pixels, compiled once for each instruction set.
//
// A weight is e^l 2^-k with one exponent k for a block of rows, so each exponential is computed once, and windows are
// sums. A window whose weights all lie far below its block's largest (its sum is under kSmallestSum, or NaN) is done
// again by itself, relative to its own largest logit.

// Sums below this have lost precision to weights that underflowed; above it at most 2^-46 of the sum.
constexpr double kSmallestSum = 0x1p-80;
// Logits beyond this are left to the windows' own computation: e^l 2^-k would not be precise.
constexpr double kLargestLogit = 16384;
// The exponents of blocks without a finite logit, and of blocks left to the windows' own computation.
constexpr int64_t kNoExponent = -(int64_t(1) << 30), kLeftExponent = int64_t(1) << 30;
// The exponent of a block is the multiple of this next above its largest logit, so that most blocks of an image share
// one, and none depends on the blocks before it: results are equal however the work is shared out.
constexpr int64_t kExponentStep = 18;
// After a block whose exponent was not the last one's, this many blocks look at their logits first.
constexpr int64_t kLooks = 16;
// Elements in the weights that NCHW keeps, and in a row of a tile; both fit the second-level cache.
constexpr int64_t kKeptElements = 8192;
constexpr int64_t kTileElements = 16384;

// 2^exponent for an exponent of at most zero; zero where float has no such normal number.
inline float power_of_two(int64_t exponent) {
  const int32_t bits = exponent < -126 ? 0 : static_cast<int32_t>(exponent + 127) << 23;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Rows of weights over some columns; pixels have as many weights as logits. Blocks of rows are opened, filled in pieces
// of columns with the exponent of the block before, and closed: if it turns out wrong, they are computed again.
template <typename T>
class Weights {
  using A = Accumulator<T>;
  using V = Vec<A>;

 public:
  // A block is the rows that a step of the windows adds, and more of them while two blocks have at most `kept` elements.
  Weights(const LipPool2dProblem& problem, Range columns, int64_t kept)
      : height_(problem.height.length),
        columns_(columns),
        row_elements_(columns.size() * problem.logit_depth()),
        block_(block_rows(problem, kept)),
        capacity_(power_of_two_above(std::min(height_, problem.height.kernel + block_ - 1))),
        weights_(capacity_ * row_elements_ + V::size),
        exponents_(capacity_) {}

  // `input` is only fetched ahead of its use, as are the logits.
  void begin(Plane<const T> logit, Plane<const T> input) {
    logit_ = logit;
    input_ = input;
    end_ = 0;
  }

  // Make these rows available.
  void slide_to(Range rows) {
    open(rows);
    fill(columns_);
    close();
  }

  // Make these rows available but for the last block of them, which is to be filled and closed.
  void open(Range rows) {
    while (end_ < rows.end) {
      pending_.begin = std::max(end_, rows.begin / block_ * block_);
      pending_.end = end_ = std::min(height_, pending_.begin + block_);
      start();
      if (end_ < rows.end) {
        fill(columns_);
        close();
      }
    }
  }

  void fill(Range columns) {
    if (pending_.size() == 0) return;
    const ScaledExp<A> scaled_exp(exponent(pending_.begin));
    const int64_t ahead = pending_.size() * logit_.width;
    V largest = largest_;
    each_run(columns, [&](int64_t row, const T* from, int64_t count) __attribute__((always_inline)) {
      const T *next = from + ahead * logit_.depth, *next_input = input_.at(row, columns.begin) + ahead * input_.depth;
      A* to = weights_.data() + slot(row) * row_elements_ + (columns.begin - columns_.begin) * logit_.depth;
      cover<V::size>(count, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
        __builtin_prefetch(next + j, 0, 2);
        __builtin_prefetch(next_input + j, 0, 2);
        const V logit = load(from + j, lanes);
        largest = max_or_second(only(logit, lanes), largest);
        store(to + j, scaled_exp(logit), lanes);
      });
    });
    largest_ = largest;
  }

  // True if the block was filled with its own exponent. If not, it is now.
  bool close() {
    if (pending_.size() == 0) return true;
    const bool own = exponent_of(largest_of(largest_)) == last_exponent_;
    if (!own) {
      compute_pending();
      looks_ = kLooks;
    }
    pending_ = {0, 0};
    return own;
  }

  const A* row(int64_t r) const { return weights_.data() + slot(r) * row_elements_; }
  int64_t exponent(int64_t r) const { return exponents_[slot(r)]; }

 private:
  int64_t slot(int64_t r) const { return r & (capacity_ - 1); }

  // A power of two.
  int64_t block_rows(const LipPool2dProblem& problem, int64_t kept) const {
    const int64_t step = std::min({problem.height.kernel, problem.height.stride, int64_t(4)});
    int64_t rows = 1;
    while (2 * rows <= step || (rows < height_ && 4 * rows * row_elements_ <= kept)) rows *= 2;
    return rows;
  }

  static int64_t power_of_two_above(int64_t number) {
    int64_t power = 1;
    while (power < number) power *= 2;
    return power;
  }

  // The exponent of a block whose largest logit below infinity is this one.
  static int64_t exponent_of(A largest) {
    if (largest < std::numeric_limits<A>::lowest()) return kNoExponent;
    if (std::abs(largest) > A(kLargestLogit)) return kLeftExponent;
    return kExponentStep * static_cast<int64_t>(std::ceil(largest * A(1.4426950408889634 / kExponentStep)));
  }

  void set_exponent(int64_t exponent) {
    for (int64_t r = pending_.begin; r < pending_.end; ++r) exponents_[slot(r)] = exponent;
  }

  void start() {
    if (last_exponent_ == kNoExponent || looks_ > 0) {
      --looks_;
      compute_pending();
    } else {
      set_exponent(last_exponent_);
      largest_ = V(-std::numeric_limits<A>::infinity());
    }
  }

  void compute_pending() {
    const int64_t exponent = exponent_of(largest_logit());
    if (exponent == kLeftExponent) {
      // Nothing, of an exponent above all others: every window that takes part in it sums to zero.
      for (int64_t r = pending_.begin; r < pending_.end; ++r) {
        std::fill_n(weights_.begin() + slot(r) * row_elements_, row_elements_, A(0));
      }
    } else {
      if (exponent != kNoExponent) last_exponent_ = exponent;
      set_exponent(exponent == kNoExponent ? 0 : exponent);
      fill(columns_);
    }
    set_exponent(exponent);
    pending_ = {0, 0};
  }

  // Calls body(row, pointer to logits, how many) for each run of logits of the pending rows.
  template <typename Body>
  PAPER_LAYERS_INLINE void each_run(Range columns, Body&& body) const {
    const int64_t count = pending_.size(), run = columns.size() * logit_.depth;
    if (columns.size() == logit_.width && slot(pending_.begin) + count <= capacity_) {
      body(pending_.begin, logit_.at(pending_.begin, columns.begin), count * run);  // all the rows at once
    } else {
      for (int64_t r = pending_.begin; r < pending_.end; ++r) body(r, logit_.at(r, columns.begin), run);
    }
  }

  // The lanes that are elements, the rest -infinity.
  static PAPER_LAYERS_INLINE V only(V logit, Full) { return logit; }
  static PAPER_LAYERS_INLINE V only(V logit, int64_t n) {
    for (int64_t i = n; i < V::size; ++i) logit.lanes[i] = -std::numeric_limits<A>::infinity();
    return logit;
  }

  // The largest finite logit; -infinity where there is none.
  A largest_logit() const {
    const V none(-std::numeric_limits<A>::infinity()), finite(std::numeric_limits<A>::max());
    V result = none;
    each_run(columns_, [&](int64_t, const T* from, int64_t count) __attribute__((always_inline)) {
      cover<V::size>(count, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
        const V logit = only(load(from + j, lanes), lanes);
        result = max_or_second(V(logit.lanes <= finite.lanes ? logit.lanes : none.lanes), result);
      });
    });
    return largest_of(result);
  }

  const int64_t height_;
  const Range columns_;
  const int64_t row_elements_, block_, capacity_;
  Plane<const T> logit_, input_;
  int64_t end_;  // of the rows that are or were available
  Range pending_ = {0, 0};
  Scratch<A> weights_;
  std::vector<int64_t> exponents_;
  int64_t last_exponent_ = kNoExponent, looks_ = 0;
  V largest_;
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

// Calls body with n as a constant where it is one of these, and else with the constant 0, so that loops unroll.
template <int... constants, typename Body>
void with_constant(int64_t n, Body&& body) {
  const bool found = ((n == constants && (body(std::integral_constant<int, constants>()), true)) || ...);
  if (!found) body(std::integral_constant<int, 0>());
}

// The rows of the image that a row of windows holds: their weights and values, and the scales that bring the weights
// to one exponent.
template <typename T>
struct TapRows {
  using A = Accumulator<T>;

  Weights<T> source;
  Plane<const T> input;
  const Range columns;
  std::vector<const A*> weights;
  std::vector<const T*> values;
  std::vector<A> scales;

  TapRows(const LipPool2dProblem& problem, Range columns, int64_t kept)
      : source(problem, columns, kept),
        columns(columns),
        weights(problem.height.kernel),
        values(problem.height.kernel),
        scales(problem.height.kernel) {}

  void begin(Plane<const T> logit, Plane<const T> image) {
    source.begin(logit, image);
    input = image;
  }

  // Take these rows of `source`; returns their exponent.
  int64_t select(Range rows) {
    int64_t exponent = kNoExponent;
    for (int64_t r = rows.begin; r < rows.end; ++r) exponent = std::max(exponent, source.exponent(r));
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      weights[r - rows.begin] = source.row(r);
      values[r - rows.begin] = input.at(r, columns.begin);
      scales[r - rows.begin] = power_of_two(source.exponent(r) - exponent);
    }
    return exponent;
  }
};

// The taps of one window, by itself: for windows that the sums above cannot resolve.
template <typename T>
struct Window {
  using A = Accumulator<T>;
  Range rows, columns;
  Plane<const T> logit, input;
  int64_t channel;
  A largest = -std::numeric_limits<A>::infinity(), weight_sum = 0, value_sum = 0;

  Window(const LipPool2dProblem& problem, Plane<const T> logit, Plane<const T> input, int64_t output_row,
         int64_t output_column, int64_t channel)
      : rows(problem.height.taps(output_row)),
        columns(problem.width.taps(output_column)),
        logit(logit),
        input(input),
        channel(channel) {
    each([&](int64_t r, int64_t c) {
      const A l = logit_at(r, c);
      largest = l > largest || std::isnan(l) ? l : largest;
    });
    each([&](int64_t r, int64_t c) {
      const A weight = std::exp(logit_at(r, c) - largest);
      weight_sum += weight;
      value_sum += weight * input_at(r, c);
    });
  }

  template <typename F>
  void each(F f) const {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      for (int64_t c = columns.begin; c < columns.end; ++c) f(r, c);
    }
  }
  A logit_at(int64_t r, int64_t c) const { return static_cast<A>(logit.at(r, c)[logit.depth > 1 ? channel : 0]); }
  A input_at(int64_t r, int64_t c) const { return static_cast<A>(input.at(r, c)[channel]); }
  A average() const { return value_sum / weight_sum; }
  A share(int64_t r, int64_t c) const { return std::exp(logit_at(r, c) - largest) / weight_sum; }
};
