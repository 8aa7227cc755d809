// NCHW: a plane is rows of numbers, and vectors run along them. Windows are sums over rows, then over columns.

// The sum of `count` vectors (`fixed`, where that is not 0), each one element after the other.
template <int fixed, typename A>
PAPER_LAYERS_INLINE Vec<A> sum_neighbors(const A* first, int64_t count) {
  Vec<A> total = load(first);
PAPER_LAYERS_UNROLL
  for (int64_t i = 1; i < (fixed ? fixed : count); ++i) total = total + load(first + i);
  return total;
}

// Sums over the windows of a row, for some columns of them.
template <typename T>
class PlanarWindows {
 public:
  using Element = T;
  using A = Accumulator<T>;
  using V = Vec<A>;

  PlanarWindows(const LipPool2dProblem& problem, Range outputs)
      : height_(problem.height),
        width_(problem.width),
        outputs_(outputs),
        taps_(problem, width_.taps(outputs), kKeptElements),
        // Vectors of the sums over columns read past the last window, into elements of no consequence.
        weight_columns_((outputs.size() - 1) * width_.stride + width_.kernel + 4 * V::size),
        value_columns_(weight_columns_.size()),
        weight_sums_(outputs.size() + V::size),
        value_sums_(weight_sums_.size()) {}

  void begin(Plane<const T> logit, Plane<const T> input) { taps_.begin(logit, input); }
  Range columns() const { return taps_.columns; }
  Range outputs() const { return outputs_; }
  const Weights<T>& weights() const { return taps_.source; }

  // Hands the sums of the weights, and of weight times value if asked, to write(first, lanes, weights, values);
  // returns their exponent.
  template <bool values, typename Write>
  int64_t sum(int64_t output_row, Write&& write) {
    const Range rows = height_.taps(output_row);
    taps_.source.slide_to(rows);
    const int64_t exponent = taps_.select(rows);
    with_constant<2, 3>(rows.size(), [&](auto count) { sum_rows<values, count>(rows.size()); });
    sum_columns(weight_columns_.data(), weight_sums_.data());
    if constexpr (values) sum_columns(value_columns_.data(), value_sums_.data());
    cover<V::size>(outputs_.size(), [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      write(i, lanes, load(weight_sums_.data() + i), values ? load(value_sums_.data() + i) : V(A(0)));
    });
    return exponent;
  }

 private:
  template <bool values, int fixed>
  void sum_rows(int64_t rows) {
    const int64_t count = fixed ? fixed : rows;
    const Unrolled<const A*, fixed> weights(taps_.weights);
    const Unrolled<const T*, fixed> inputs(taps_.values);
    const Unrolled<A, fixed> scales(taps_.scales);
    const int64_t left = taps_.columns.begin - width_.start(outputs_.begin);
    A* weight_out = weight_columns_.data() + left;
    A* value_out = value_columns_.data() + left;
    cover<V::size>(taps_.columns.size(), [&](int64_t j, auto lanes) __attribute__((always_inline)) {
      V weight_sum(A(0)), value_sum(A(0));
PAPER_LAYERS_UNROLL
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
    with_constant<2, 3>(width_.kernel, [&](auto kernel) { sum_columns<kernel>(columns, sums); });
  }

  template <int fixed>
  void sum_columns(const A* columns, A* sums) const {
    const int64_t kernel = fixed ? fixed : width_.kernel, stride = width_.stride, outputs = outputs_.size();
    if (stride == 1) {
      for (int64_t o = 0; o < outputs; o += V::size) store(sums + o, sum_neighbors<fixed>(columns + o, kernel));
    } else if (stride == 2) {
      for (int64_t o = 0; o < outputs; o += V::size) {
        store(sums + o, even_lanes(sum_neighbors<fixed>(columns + 2 * o, kernel),
                                   sum_neighbors<fixed>(columns + 2 * o + V::size, kernel)));
      }
    } else {
      for (int64_t o = 0; o < outputs; ++o) {
        sums[o] = std::accumulate(columns + o * stride, columns + o * stride + kernel, A(0));
      }
    }
  }

  const Side height_, width_;
  const Range outputs_;
  TapRows<T> taps_;
  Scratch<A> weight_columns_, value_columns_, weight_sums_, value_sums_;
};

// The sums of the backward's two numbers over the windows that hold a column, for the rows of windows that hold one row
// of the image.
template <typename T>
class PlanarShares {
 public:
  using A = Accumulator<T>;
  using V = Vec<A>;

  PlanarShares(const LipPool2dProblem& problem, Range outputs, Range columns)
      : side_(problem.width),
        columns_(columns),
        first_(columns.begin - side_.start(outputs.begin)),
        outputs_(outputs.size()),
        // Zeros on either side.
        share_(outputs_ + 4 * V::size),
        product_(share_.size()),
        // Outputs apart by the stride, zeros between them, and a window's reach of zeros on either side.
        spread_((outputs.size() - 1) * side_.stride + 2 * side_.kernel + 2 * V::size),
        slots_(problem.height.covering_at_most()),
        slot_elements_((columns.size() / V::size + 3) * V::size),
        share_sums_(slots_ * slot_elements_),
        product_sums_(slots_ * slot_elements_),
        shares_(slots_),
        products_(slots_) {}

  // Where the two numbers of a row of windows go; then keep() takes them.
  A* share(int64_t) { return share_.data() + V::size; }
  A* product(int64_t) { return product_.data() + V::size; }
  void keep(int64_t output_row) {
    spread(share_, share_sums_.data() + output_row % slots_ * slot_elements_);
    spread(product_, product_sums_.data() + output_row % slots_ * slot_elements_);
  }

  // Hands the sums over some rows of windows, scaled, to write(first element, its pixel, lanes, shares, products).
  template <typename Write>
  void gather(Range rows, const std::vector<A>& scales_of_rows, Write&& write) {
    for (int64_t o = rows.begin; o < rows.end; ++o) {
      shares_[o - rows.begin] = share_sums_.data() + o % slots_ * slot_elements_;
      products_[o - rows.begin] = product_sums_.data() + o % slots_ * slot_elements_;
    }
    with_constant<1, 2>(rows.size(), [&](auto fixed) __attribute__((always_inline)) {
      const int64_t count = fixed ? fixed : rows.size();
      const Unrolled<A, fixed> scales(scales_of_rows);
      const Unrolled<const A*, fixed> shares(shares_), products(products_);
      cover<V::size>(columns_.size(), [&](int64_t j, auto lanes) __attribute__((always_inline)) {
        V share(A(0)), product(A(0));
PAPER_LAYERS_UNROLL
        for (int64_t o = 0; o < count; ++o) {
          share = multiply_add(V(scales[o]), load(shares[o] + j), share);
          product = multiply_add(V(scales[o]), load(products[o] + j), product);
        }
        write(j, j, lanes, share, product);
      });
    });
  }

 private:
  void spread(const Scratch<A>& padded, A* sums) {
    const int64_t kernel = side_.kernel, stride = side_.stride;
    const A* windows = padded.data() + V::size;
    if (kernel == 3 && stride == 2) {
      // Columns are in turn held by one window and by two.
      const A* from = windows + first_ / 2;
      for (int64_t j = 0; j < columns_.size(); j += 2 * V::size, from += V::size) {
        const V here = load(from), both = here + load(from + 1);
        if (first_ % 2 == 1) store_in_turn(sums + j, here, both);
        else store_in_turn(sums + j, load(from - 1) + here, here);
      }
      return;
    }
    A* first = spread_.data() + kernel - 1;
    for (int64_t o = 0; o < outputs_; ++o) first[o * stride] = windows[o];
    const A* from = spread_.data() + first_;
    with_constant<3>(kernel, [&](auto fixed) __attribute__((always_inline)) {
      for (int64_t j = 0; j < columns_.size(); j += V::size) store(sums + j, sum_neighbors<fixed>(from + j, kernel));
    });
  }

  const Side side_;
  const Range columns_;
  const int64_t first_, outputs_;
  Scratch<A> share_, product_, spread_;
  const int64_t slots_, slot_elements_;
  Scratch<A> share_sums_, product_sums_;
  std::vector<const A*> shares_, products_;
};
