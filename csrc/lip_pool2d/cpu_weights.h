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
// A block may keep the exponent of the one before it while its largest logit is this little below.
constexpr int64_t kSlack = 16, kHeadroom = 2;
// Elements in a block of weights that NCHW computes at once, and in a row of a tile; both fit the second-level cache.
constexpr int64_t kBlockElements = 8192;
constexpr int64_t kTileElements = 16384;

// 2^exponent for an exponent of at most zero; zero where float has no such normal number.
inline float power_of_two(int64_t exponent) {
  const int32_t bits = exponent < -126 ? 0 : static_cast<int32_t>(exponent + 127) << 23;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Rows of weights over some columns; pixels have as many weights as logits. Rows are opened, filled in pieces of columns
// with the exponent of the rows before, and closed: if that exponent does not suit, they are then computed again.
template <typename T>
class Weights {
  using A = Accumulator<T>;
  using V = Vec<A>;

 public:
  // Rows are kept for a window, and more of them while they have at most `block` elements.
  Weights(const LipPool2dProblem& problem, Range columns, int64_t block)
      : height_(problem.height.length),
        columns_(columns),
        row_elements_(columns.size() * problem.logit_depth()),
        capacity_(capacity(problem, block)),
        weights_(capacity_ * row_elements_ + V::size),
        exponents_(capacity_) {}

  // `input` is only fetched ahead of its use, as are the logits.
  void begin(Plane<const T> logit, Plane<const T> input) {
    logit_ = logit;
    input_ = input;
    rows_ = {0, 0};
  }

  // Make these rows available, and those after them that fit.
  void slide_to(Range rows) {
    if (rows.end <= rows_.end) return;
    open({rows.begin, std::min(height_, rows.begin + capacity_)});
    fill(columns_);
    close();
  }

  // Prepare to fill the new ones among these rows.
  void open(Range rows) {
    pending_ = {std::max(rows.begin, rows_.end), rows.end};
    rows_ = rows;
    if (last_exponent_ == kNoExponent) return compute_pending();
    set_exponent(last_exponent_);
    largest_ = V(-std::numeric_limits<A>::infinity());
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
        largest = max_or_second(logit, largest);
        store(to + j, scaled_exp(logit), lanes);
      });
    });
    largest_ = largest;
  }

  // Whether the rows were filled well. If not, they are now.
  bool close() {
    if (pending_.size() == 0) return true;
    const A largest = largest_of(largest_) * A(1.4426950408889634);
    const bool suits = largest <= last_exponent_ && largest >= last_exponent_ - kSlack;
    if (!suits) compute_pending();
    pending_ = {0, 0};
    return suits;
  }

  const A* row(int64_t r) const { return weights_.data() + slot(r) * row_elements_; }
  int64_t exponent(int64_t r) const { return exponents_[slot(r)]; }

 private:
  int64_t slot(int64_t r) const { return r & (capacity_ - 1); }

  // Rows that are kept, a power of two.
  int64_t capacity(const LipPool2dProblem& problem, int64_t block) const {
    int64_t rows = 1;
    while (rows <= problem.height.kernel || (rows < height_ && 2 * rows * row_elements_ <= block)) rows *= 2;
    return rows;
  }

  void set_exponent(int64_t exponent) {
    for (int64_t r = pending_.begin; r < pending_.end; ++r) exponents_[slot(r)] = exponent;
  }

  void compute_pending() {
    const A largest = largest_logit();
    const bool none = largest < std::numeric_limits<A>::lowest();
    if (!none && std::abs(largest) > A(kLargestLogit)) {
      // Nothing, of an exponent above all others: every window that takes part in it sums to zero.
      set_exponent(kLeftExponent);
      for (int64_t r = pending_.begin; r < pending_.end; ++r) {
        std::fill_n(weights_.begin() + slot(r) * row_elements_, row_elements_, A(0));
      }
    } else {
      const int64_t exponent = none ? 0 : static_cast<int64_t>(std::ceil(largest * A(1.4426950408889634))) + kHeadroom;
      set_exponent(exponent);
      fill(columns_);
      if (none) set_exponent(kNoExponent);
      else last_exponent_ = exponent;
    }
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

  // The largest finite logit; -infinity where there is none.
  A largest_logit() const {
    const V none(-std::numeric_limits<A>::infinity()), finite(std::numeric_limits<A>::max());
    V result = none;
    each_run(columns_, [&](int64_t, const T* from, int64_t count) __attribute__((always_inline)) {
      cover<V::size>(count, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
        const V logit = load(from + j, lanes);
        result = max_or_second(V(logit.lanes <= finite.lanes ? logit.lanes : none.lanes), result);
      });
    });
    return largest_of(result);
  }

  const int64_t height_;
  const Range columns_;
  const int64_t row_elements_, capacity_;
  Plane<const T> logit_, input_;
  Range rows_, pending_ = {0, 0};
  Scratch<A> weights_;
  std::vector<int64_t> exponents_;
  int64_t last_exponent_ = kNoExponent;
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

  TapRows(const LipPool2dProblem& problem, Range columns, int64_t block)
      : source(problem, columns, block),
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
