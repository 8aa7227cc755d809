// Small images: planes too narrow for vectors along their rows, or pixels of fewer channels than a vector holds. Planes,
// also those of several images, lie side by side in vectors. A weight is e^(l - largest logit of the plane), so no plane
// depends on the others.

template <typename T>
class PackedPlanes {
  using A = Accumulator<T>;
  using V = Vec<A>;
  static constexpr int64_t kLanes = kVectorElements, kVectors = kLanes / V::size;
  struct Sums {
    V weights[kVectors], values[kVectors];
  };

 public:
  explicit PackedPlanes(const LipPool2dProblem& problem)
      : problem_(problem),
        pixels_(problem.height.length * problem.width.length),
        outputs_(problem.height.outputs * problem.width.outputs),
        weights_(pixels_ * kLanes),
        values_(pixels_ * kLanes),
        results_(outputs_ * kLanes) {}

  // Calls work(planes of this thread's own, group) for all groups of planes in parallel.
  template <typename Work>
  static void for_each_group(const LipPool2dProblem& problem, const Work& work) {
    const int64_t planes = problem.images * problem.channels;
    const int64_t elements = kLanes * problem.height.length * problem.width.length;
    parallel_for(0, (planes + kLanes - 1) / kLanes, 1 + kGrainElements / elements, [&](int64_t begin, int64_t end) {
      PackedPlanes<T> own(problem);
      for (int64_t group = begin; group < end; ++group) work(own, group);
    });
  }

  void forward(int64_t group, const T* input, const T* logit, T* output) {
    begin(group, input, logit);
    each_window([&](int64_t r, int64_t c, int64_t w) {
      const Sums sums = sum(r, c);
      for (int64_t v = 0; v < kVectors; ++v) store(at(results_, w, v), sums.values[v] / sums.weights[v]);
      each_unresolved(sums, [&](int64_t lane) { results_[w * kLanes + lane] = window(lane, r, c).average(); });
    });
    write(results_.data(), outputs_, output);
  }

  void backward(int64_t group, const T* grad, const T* input, const T* logit, T* grad_input, T* grad_logit) {
    begin(group, input, logit);
    read(grad, outputs_, results_.data());
    find_gaps();
    shares_.assign(weights_.size(), 0);
    products_.assign(weights_.size(), 0);
    unresolved_.clear();
    each_window([&](int64_t r, int64_t c, int64_t w) {
      const Sums sums = sum(r, c);
      V share[kVectors], product[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) {
        share[v] = load(at(results_, w, v)) / sums.weights[v];
        product[v] = share[v] * (sums.values[v] / sums.weights[v]);
      }
      each_unresolved(sums, [&](int64_t lane) {
        share[lane / V::size].lanes[lane % V::size] = product[lane / V::size].lanes[lane % V::size] = 0;
        unresolved_.push_back({lane, window(lane, r, c), results_[w * kLanes + lane]});
      });
      each_tap(r, c, [&](int64_t p) __attribute__((always_inline)) {
        for (int64_t v = 0; v < kVectors; ++v) {
          store(at(shares_, p, v), load(at(shares_, p, v)) + share[v]);
          store(at(products_, p, v), load(at(products_, p, v)) + product[v]);
        }
      });
    });
    for (int64_t p = 0; p < pixels_; ++p) {
      if (gaps_[p]) continue;
      for (int64_t v = 0; v < kVectors; ++v) {
        const V weight = load(at(weights_, p, v)), share = load(at(shares_, p, v));
        const V product = load(at(products_, p, v));
        store(at(shares_, p, v), weight * share);
        store(at(products_, p, v), weight * (load(at(values_, p, v)) * share - product));
      }
    }
    for (const Unresolved& one : unresolved_) add(one);
    write(shares_.data(), pixels_, grad_input);
    write(products_.data(), pixels_, grad_logit);
  }

 private:
  struct Unresolved {
    int64_t lane;
    Window<T> window;
    A grad;
  };

  template <typename U>
  static PAPER_LAYERS_INLINE U* at(Scratch<U>& of, int64_t pixel, int64_t vector) {
    return of.data() + pixel * kLanes + vector * V::size;
  }

  // The last plane fills what is left over.
  void begin(int64_t group, const T* input, const T* logit) {
    const int64_t planes = problem_.images * problem_.channels;
    count_ = std::min(kLanes, planes - group * kLanes);
    for (int64_t lane = 0; lane < kLanes; ++lane) planes_[lane] = group * kLanes + std::min(lane, count_ - 1);
    input_ = input;
    logit_ = logit;
    read(input, pixels_, values_.data());
    read(logit, pixels_, weights_.data());
    const V none(-std::numeric_limits<A>::infinity()), finite(std::numeric_limits<A>::max());
    for (int64_t v = 0; v < kVectors; ++v) {
      V largest = none;
      for (int64_t p = 0; p < pixels_; ++p) {
        const V l = load(at(weights_, p, v));
        largest = max_or_second(V(l.lanes <= finite.lanes ? l.lanes : none.lanes), largest);
      }
      const ScaledExp<A> exp(0);
      for (int64_t p = 0; p < pixels_; ++p) store(at(weights_, p, v), exp(load(at(weights_, p, v)) - largest));
    }
  }

  int64_t start(int64_t lane, int64_t pixels) const {
    const int64_t plane = planes_[lane];
    if (!problem_.channels_last) return plane * pixels;
    return plane / problem_.channels * problem_.channels * pixels + plane % problem_.channels;
  }

  void read(const T* from, int64_t pixels, A* to) const {
    const int64_t step = problem_.depth();
    const T* starts[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) starts[lane] = from + start(lane, pixels);
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t lane = 0; lane < kLanes; ++lane) to[p * kLanes + lane] = static_cast<A>(starts[lane][p * step]);
    }
  }

  void write(const A* from, int64_t pixels, T* to) const {
    const int64_t step = problem_.depth();
    for (int64_t lane = 0; lane < count_; ++lane) {
      T* const plane = to + start(lane, pixels);
      for (int64_t p = 0; p < pixels; ++p) plane[p * step] = static_cast<T>(from[p * kLanes + lane]);
    }
  }

  // The pixels that no window holds have no gradient, whatever their values.
  void find_gaps() {
    if (!gaps_.empty()) return;
    gaps_.assign(pixels_, true);
    each_window([&](int64_t r, int64_t c, int64_t) { each_tap(r, c, [&](int64_t p) { gaps_[p] = false; }); });
  }

  // Calls body(row, column, number) for each window.
  template <typename Body>
  void each_window(const Body& body) const {
    for (int64_t r = 0; r < problem_.height.outputs; ++r) {
      for (int64_t c = 0; c < problem_.width.outputs; ++c) body(r, c, r * problem_.width.outputs + c);
    }
  }

  // Calls body(pixel) for each pixel of a window.
  template <typename Body>
  PAPER_LAYERS_INLINE void each_tap(int64_t r, int64_t c, const Body& body) const {
    const Range rows = problem_.height.taps(r), columns = problem_.width.taps(c);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t first = row * problem_.width.length;
      for (int64_t p = first + columns.begin; p < first + columns.end; ++p) body(p);
    }
  }

  PAPER_LAYERS_INLINE Sums sum(int64_t r, int64_t c) {
    Sums sums;
    for (int64_t v = 0; v < kVectors; ++v) sums.weights[v] = sums.values[v] = V(A(0));
    each_tap(r, c, [&](int64_t p) __attribute__((always_inline)) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const V weight = load(at(weights_, p, v));
        sums.weights[v] = sums.weights[v] + weight;
        sums.values[v] = multiply_add(weight, load(at(values_, p, v)), sums.values[v]);
      }
    });
    return sums;
  }

  // Calls body(lane) where the sum of weights is not precise.
  template <typename Body>
  PAPER_LAYERS_INLINE void each_unresolved(const Sums& sums, const Body& body) const {
    const V small(static_cast<A>(kSmallestSum)), finite(std::numeric_limits<A>::max());
    for (int64_t v = 0; v < kVectors; ++v) {
      const auto resolved = (sums.weights[v].lanes >= small.lanes) & (sums.weights[v].lanes <= finite.lanes);
      if (lanes_set(~resolved) == 0) continue;
      for (int64_t i = 0; i < V::size; ++i) {
        if (!resolved[i] && v * V::size + i < count_) body(v * V::size + i);
      }
    }
  }

  Window<T> window(int64_t lane, int64_t r, int64_t c) const {
    const int64_t plane = planes_[lane] / (problem_.channels_last ? problem_.channels : 1);
    const int64_t channel = problem_.channels_last ? planes_[lane] % problem_.channels : 0;
    return {problem_, problem_.logit_plane(logit_, plane), problem_.input_plane(input_, plane), r, c, channel};
  }

  void add(const Unresolved& one) {
    const A average = one.window.average();
    one.window.each([&](int64_t r, int64_t c) {
      const int64_t i = (r * problem_.width.length + c) * kLanes + one.lane;
      const A grad = one.grad * one.window.share(r, c);
      shares_[i] += grad;
      products_[i] += grad * (one.window.input_at(r, c) - average);
    });
  }

  const LipPool2dProblem& problem_;
  const int64_t pixels_, outputs_;
  Scratch<A> weights_, values_, results_, shares_, products_;  // results: outputs, or their gradients
  std::vector<char> gaps_;
  std::vector<Unresolved> unresolved_;
  int64_t count_, planes_[kLanes];
  const T *input_, *logit_;
};
