// Channels_last: a pixel is all channels, and vectors run along them. A window is summed over its taps at once: they
// come from the caches, and nothing but the weights is stored on the way.

// Elements of a row whose weights are computed, in each new row, before the windows that hold them.
constexpr int64_t kTogetherElements = 512;

// Sums over the windows of a row, for some columns of them.
template <typename T>
class ChannelsLastWindows {
 public:
  using Element = T;
  using A = Accumulator<T>;
  using V = Vec<A>;

  ChannelsLastWindows(const LipPool2dProblem& problem, Range outputs)
      : height_(problem.height),
        width_(problem.width),
        depth_(problem.channels),
        shared_(problem.shared),
        outputs_(outputs),
        taps_(problem, width_.taps(outputs), 0),
        together_(std::max<int64_t>(1, kTogetherElements / (width_.stride * depth_))) {}

  void begin(Plane<const T> logit, Plane<const T> input) { taps_.begin(logit, input); }
  Range columns() const { return taps_.columns; }
  Range outputs() const { return outputs_; }
  const Weights<T>& weights() const { return taps_.source; }

  // Hands the sums of the weights, and of weight times value if asked, to write(first, lanes, weights, values);
  // returns their exponent.
  template <bool values, typename Write>
  int64_t sum(int64_t output_row, Write&& write) {
    const Range rows = height_.taps(output_row);
    Weights<T>& weights = taps_.source;
    weights.open(rows);
    int64_t exponent = taps_.select(rows);
    each_window<values>(rows.size(), write);
    if (!weights.close()) {
      exponent = taps_.select(rows);
      each_window<values>(rows.size(), write);
    }
    return exponent;
  }

 private:
  // The weights are computed a few columns ahead of the windows, so that these find them in the first-level cache.
  template <bool values, typename Write>
  void each_window(int64_t rows, Write& write) {
    int64_t filled = taps_.columns.begin;
    for (int64_t o = outputs_.begin; o < outputs_.end; ++o) {
      const Range columns = width_.taps(o);
      if (columns.end > filled) {
        const int64_t end = width_.taps(std::min(o + together_, outputs_.end) - 1).end;
        taps_.source.fill({filled, end});
        filled = end;
      }
      // Only square windows are unrolled: there are enough functions of these.
      with_constant<2, 3>(rows == columns.size() ? rows : 0, [&](auto fixed) {
        const int64_t output = (o - outputs_.begin) * depth_;
        if (shared_) window<values, true, fixed>(rows, columns, output, write);
        else window<values, false, fixed>(rows, columns, output, write);
      });
    }
  }

  template <bool values, bool shared, int fixed, typename Write>
  void window(int64_t rows, Range columns, int64_t output, Write& write) const {
    const int64_t row_count = fixed ? fixed : rows;
    const int64_t column_count = fixed ? fixed : columns.size();
    const Unrolled<const A*, fixed> weights(taps_.weights);
    const Unrolled<const T*, fixed> inputs(taps_.values);
    const Unrolled<A, fixed> scales(taps_.scales);
    const int64_t first = columns.begin - taps_.columns.begin, depth = depth_;
    cover_whole<V::size>(depth, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
      V weight_sum(A(0)), value_sum(A(0));
PAPER_LAYERS_UNROLL
      for (int64_t r = 0; r < row_count; ++r) {
        V row_weight(A(0)), row_value(A(0));
PAPER_LAYERS_UNROLL
        for (int64_t c = 0; c < column_count; ++c) {
          const int64_t element = (first + c) * depth + d;
          const V weight = shared ? V(weights[r][first + c]) : load(weights[r] + element);
          row_weight = row_weight + weight;
          if constexpr (values) row_value = multiply_add(weight, load(inputs[r] + element, lanes), row_value);
        }
        weight_sum = multiply_add(row_weight, V(scales[r]), weight_sum);
        if constexpr (values) value_sum = multiply_add(row_value, V(scales[r]), value_sum);
      }
      write(output + d, lanes, weight_sum, value_sum);
    });
  }

  const Side height_, width_;
  const int64_t depth_;
  const bool shared_;
  const Range outputs_;
  TapRows<T> taps_;
  const int64_t together_;  // windows
};

// The backward's two numbers for each window, for the rows of windows that hold one row of the image.
template <typename T>
class ChannelsLastShares {
 public:
  using A = Accumulator<T>;
  using V = Vec<A>;

  ChannelsLastShares(const LipPool2dProblem& problem, Range outputs, Range columns)
      : depth_(problem.channels),
        columns_(columns),
        slots_(problem.height.covering_at_most()),
        slot_elements_(outputs.size() * depth_),
        share_(slots_ * slot_elements_ + V::size),
        product_(share_.size()),
        shares_(slots_),
        products_(slots_) {
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      const Range holding = problem.width.covering(j);
      holding_.push_back({holding.begin - outputs.begin, holding.end - outputs.begin});
    }
  }

  // Where the two numbers of a row of windows go; then keep() takes them.
  A* share(int64_t output_row) { return share_.data() + output_row % slots_ * slot_elements_; }
  A* product(int64_t output_row) { return product_.data() + output_row % slots_ * slot_elements_; }
  void keep(int64_t) {}

  // Hands the sums over some rows of windows, scaled, to write(first element, its pixel, lanes, shares, products).
  template <typename Write>
  void gather(Range rows, const std::vector<A>& scales, Write&& write) {
    for (int64_t o = rows.begin; o < rows.end; ++o) {
      shares_[o - rows.begin] = share(o);
      products_[o - rows.begin] = product(o);
    }
    for (int64_t j = 0; j < columns_.size(); ++j) {
      const int64_t r = rows.size(), c = holding_[j].size();
      if (c == 0) continue;
      with_constant<3, 4, 5, 6>(r <= 2 && c <= 2 ? 2 * r + c : 0, [&](auto both) {
        constexpr int fixed_rows = both > 0 ? (both - 1) / 2 : 0, fixed_columns = both - 2 * fixed_rows;
        pixel<fixed_rows, fixed_columns>(r, holding_[j], scales, j, write);
      });
    }
  }

 private:
  template <int fixed_rows, int fixed_columns, typename Write>
  void pixel(int64_t rows, Range holding, const std::vector<A>& scales_of_rows, int64_t pixel, Write& write) const {
    const int64_t row_count = fixed_rows ? fixed_rows : rows;
    const int64_t column_count = fixed_columns ? fixed_columns : holding.size();
    const Unrolled<A, fixed_rows> scales(scales_of_rows);
    const Unrolled<const A*, fixed_rows> shares(shares_), products(products_);
    const int64_t depth = depth_, first = holding.begin * depth;
    cover_whole<V::size>(depth, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
      V share(A(0)), product(A(0));
PAPER_LAYERS_UNROLL
      for (int64_t r = 0; r < row_count; ++r) {
        V row_share(A(0)), row_product(A(0));
PAPER_LAYERS_UNROLL
        for (int64_t c = 0; c < column_count; ++c) {
          row_share = row_share + load(shares[r] + first + c * depth + d);
          row_product = row_product + load(products[r] + first + c * depth + d);
        }
        share = multiply_add(row_share, V(scales[r]), share);
        product = multiply_add(row_product, V(scales[r]), product);
      }
      write(pixel * depth + d, pixel, lanes, share, product);
    });
  }

  const int64_t depth_;
  const Range columns_;
  std::vector<Range> holding_;  // the outputs that hold each column
  const int64_t slots_, slot_elements_;
  Scratch<A> share_, product_;
  std::vector<const A*> shares_, products_;
};
