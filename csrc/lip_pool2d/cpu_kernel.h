// The CPU kernels of local importance-based pooling, compiled once for each instruction set.
#include "lip_pool2d/cpu_windows.h"

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

// The work in pieces: for each tile of columns and band of rows, every plane, so that scratch serves many.
struct Tasks {
  int64_t planes, columns, rows, tile, band, tiles, bands;

  Tasks(int64_t planes, int64_t columns, int64_t rows, int64_t tile_columns) : planes(planes), columns(columns), rows(rows) {
    tile = std::clamp<int64_t>(tile_columns, 1, columns);
    tiles = (columns + tile - 1) / tile;
    // Bands only where there is too little else to share out: their borders are computed twice.
    const int64_t wanted = 4 * torch::stable::get_num_threads() / (planes * tiles);
    band = (rows - 1) / std::clamp<int64_t>(wanted, 1, 1 + rows / 8) + 1;
    bands = (rows + band - 1) / band;
  }

  Range tile_at(int64_t index) const {
    const int64_t begin = index / planes % tiles * tile;
    return {begin, std::min(columns, begin + tile)};
  }
  Range band_at(int64_t index) const {
    const int64_t begin = index / planes / tiles * band;
    return {begin, std::min(rows, begin + band)};
  }

  // Calls work(columns, rows), which makes a function of the plane's number, in parallel.
  template <typename Work>
  void run(const Work& work) const {
    torch::stable::parallel_for(0, planes * tiles * bands, 1, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t stop = std::min(end, (begin / planes + 1) * planes);
        auto piece = work(tile_at(begin), band_at(begin));
        for (; begin < stop; ++begin) piece(begin % planes);
      }
    });
  }
};

template <typename T>
class Forward {
  using A = Accumulator<T>;
  using V = Vec<A>;

 public:
  Forward(const LipPool2dProblem& problem, Range columns, Range rows)
      : problem_(problem), columns_(columns), rows_(rows), windows_(problem, columns) {}

  void run(Plane<const T> input, Plane<const T> logit, Plane<T> output) {
    windows_.begin(logit, input);
    for (int64_t o = rows_.begin; o < rows_.end; ++o) {
      windows_.template sum<true>(o);
      const A *weights = windows_.weight_sums(), *values = windows_.value_sums();
      T* out = output.at(o, columns_.begin);
      typename V::BitLanes unresolved = {};
      cover<V::size>(windows_.count(), [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const V weight = load(weights + i);
        unresolved |= ~(weight.lanes >= V(A(kSmallestSum)).lanes);
        store(out + i, load(values + i) / weight, lanes);
      });
      if (!any(unresolved)) continue;
      for (int64_t i = 0; i < windows_.count(); ++i) {
        if (weights[i] >= A(kSmallestSum)) continue;
        const int64_t column = columns_.begin + i / input.depth;
        out[i] = static_cast<T>(Window<T>(problem_, logit, input, o, column, i % input.depth).average());
      }
    }
  }

 private:
  const LipPool2dProblem& problem_;
  const Range columns_, rows_;
  Windows<T> windows_;
};

template <typename T>
void forward(const LipPool2dProblem& problem, const T* input, const T* logit, T* output) {
  const Tasks tasks(problem.planes(), problem.width.outputs, problem.height.outputs,
                    kTileElements / (problem.depth() * problem.width.stride));
  tasks.run([&](Range columns, Range rows) {
    return [&, task = Forward<T>(problem, columns, rows)](int64_t plane) mutable {
      task.run(problem.input_plane(input, plane), problem.logit_plane(logit, plane), problem.output_plane(output, plane));
    };
  });
}

// Gradients of some rows and columns of the input, streamed down the rows of windows that reach them.
// With the gradient's share of a window s = g / sum(weights) and its product with the output, t = s * out,
// dx = weight * sum(s) and dl = weight * (x * sum(s) - sum(t)), sums over the windows that hold the pixel.
template <typename T>
class Backward {
  using A = Accumulator<T>;
  using V = Vec<A>;

 public:
  Backward(const LipPool2dProblem& problem, Range columns, Range rows)
      : problem_(problem),
        depth_(problem.depth()),
        columns_(columns),
        rows_(rows),
        outputs_(problem.height.reaching(rows)),
        windows_(problem, problem.width.reaching(columns)),
        covered_(intersection(columns, windows_.columns())),
        // Outputs apart by the stride, zeros between them, and a window's reach of zeros on either side.
        spread_(depth_ == 1 ? (windows_.outputs().size() - 1) * problem.width.stride + 2 * problem.width.kernel + 2 * V::size : 0),
        share_(windows_.count() + V::size),
        product_(share_.size()),
        slots_((problem.height.kernel + problem.height.stride - 1) / problem.height.stride),
        slot_elements_(covered_.size() * depth_ + V::size),
        share_sums_(slots_ * slot_elements_),
        product_sums_(slots_ * slot_elements_),
        exponents_(slots_),
        logit_row_(slot_elements_),
        streaming_(problem.planes() * problem.height.length * problem.width.length * depth_ * int64_t(sizeof(T)) >
                   kStreamingBytes) {
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      holding_.push_back(problem.width.covering(j));
      if (holding_.back().size() == 0) gaps_.push_back(j);
    }
  }

  // With shared_sums, the logits' gradients are added to it, else written to grad_logit.
  void run(Plane<const T> grad, Plane<const T> input, Plane<const T> logit, Plane<const T> output, Plane<T> grad_input,
           Plane<T> grad_logit, A* shared_sums) {
    input_ = input;
    logit_ = logit;
    grad_input_ = grad_input;
    grad_logit_ = grad_logit;
    shared_sums_ = shared_sums;
    windows_.begin(logit, input);
    unresolved_.clear();
    int64_t row = rows_.begin;
    for (int64_t o = outputs_.begin; o < outputs_.end; ++o) {
      const int64_t slot = o % slots_;
      exponents_[slot] = windows_.template sum<false>(o);
      divide(grad, output, o);
      spread(share_, share_sums_.data() + slot * slot_elements_);
      spread(product_, product_sums_.data() + slot * slot_elements_);
      for (; row < rows_.end && problem_.height.covering(row).end <= o + 1; ++row) finish(row);
    }
    for (; row < rows_.end; ++row) finish(row);
    if (streaming_) finish_streaming();
    for (const Unresolved& window : unresolved_) add(window);
  }

 private:
  struct Unresolved {
    int64_t row, column, channel;
    A grad;
  };

  // The gradient's share of each window in a row of them.
  void divide(Plane<const T> grad_plane, Plane<const T> output_plane, int64_t o) {
    const T* grad = grad_plane.at(o, windows_.outputs().begin);
    const T* output = output_plane.at(o, windows_.outputs().begin);
    const A* weights = windows_.weight_sums();
    typename V::BitLanes unresolved = {};
    cover<V::size>(windows_.count(), [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const V weight = load(weights + i);
      unresolved |= ~(weight.lanes >= V(A(kSmallestSum)).lanes);
      const V share = load(grad + i, lanes) / weight;
      store(share_.data() + i, share, lanes);
      store(product_.data() + i, share * load(output + i, lanes), lanes);
    });
    if (!any(unresolved)) return;
    for (int64_t i = 0; i < windows_.count(); ++i) {
      if (weights[i] >= A(kSmallestSum)) continue;
      share_[i] = product_[i] = 0;
      unresolved_.push_back({o, windows_.outputs().begin + i / depth_, i % depth_, static_cast<A>(grad[i])});
    }
  }

  // Sums over the windows of a row that hold each column.
  void spread(const std::vector<A>& windows, A* sums) {
    const int64_t kernel = problem_.width.kernel, stride = problem_.width.stride;
    const int64_t first_output = windows_.outputs().begin;
    if (depth_ > 1) {
      for (int64_t j = 0; j < covered_.size(); ++j) {
        const Range holding = holding_[covered_.begin - columns_.begin + j];
        const A* from = windows.data() + (holding.begin - first_output) * depth_;
        if (holding.size() == 1) {
          std::copy_n(from, depth_, sums + j * depth_);
        } else if (holding.size() > 1) {
          cover<V::size>(depth_, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
            store(sums + j * depth_ + d, sum_strided<0>(from + d, depth_, holding.size()), lanes);
          });
        }
      }
      return;
    }
    A* first = spread_.data() + kernel - 1;
    if (stride == 2) {
      for (int64_t o = 0; o < windows_.count(); o += V::size) spread_lanes(load(windows.data() + o), first + 2 * o);
    } else {
      for (int64_t o = 0; o < windows_.count(); ++o) first[o * stride] = windows[o];
    }
    const A* from = spread_.data() + covered_.begin - problem_.width.start(first_output);
    for (int64_t j = 0; j < covered_.size(); j += V::size) {
      store(sums + j, kernel == 3 ? sum_strided<3>(from + j, 1, 3) : sum_strided<0>(from + j, 1, kernel));
    }
  }

  // Write a row of gradients once all windows that hold it are known.
  void finish(int64_t row) {
    const Range holding = problem_.height.covering(row);
    if (holding.size() == 0) {
      for (int64_t j = columns_.begin; j < columns_.end; ++j) clear(row, j);
      return;
    }
    if (shared_sums_) {
      gradients(row, holding, logit_row_.data());
      A* sums = shared_sums_ + (row - rows_.begin) * columns_.size() - columns_.begin;
      for (int64_t j = covered_.begin; j < covered_.end; ++j) sums[j] += logit_row_[j - covered_.begin];
    } else if (logit_.depth != depth_) {
      gradients(row, holding, logit_row_.data());
      for (int64_t j = covered_.begin; j < covered_.end; ++j) {
        const A* sums = logit_row_.data() + (j - covered_.begin) * depth_;
        *grad_logit_.at(row, j) = static_cast<T>(std::accumulate(sums, sums + depth_, A(0)));
      }
    } else {
      gradients(row, holding, grad_logit_.at(row, covered_.begin));
    }
    for (const int64_t j : gaps_) clear(row, j);
  }

  // Zero where no window reaches.
  void clear(int64_t row, int64_t column) {
    std::fill_n(grad_input_.at(row, column), depth_, T(0));
    if (shared_sums_) {
      shared_sums_[(row - rows_.begin) * columns_.size() + column - columns_.begin] = 0;
    } else {
      std::fill_n(grad_logit_.at(row, column), logit_.depth, T(0));
    }
  }

  template <typename L>
  void gradients(int64_t row, Range holding, L* grad_logit) {
    row_scales_.clear();
    row_shares_.clear();
    row_products_.clear();
    for (int64_t o = holding.begin; o < holding.end; ++o) {
      const int64_t slot = o % slots_;
      row_scales_.push_back(power_of_two<A>(windows_.weights().exponent(row) - exponents_[slot]));
      row_shares_.push_back(share_sums_.data() + slot * slot_elements_);
      row_products_.push_back(product_sums_.data() + slot * slot_elements_);
    }
    switch (holding.size()) {
      case 1: return gradients<1>(row, 1, grad_logit);
      case 2: return gradients<2>(row, 2, grad_logit);
      default: return gradients<0>(row, holding.size(), grad_logit);
    }
  }

  template <int fixed, typename L>
  void gradients(int64_t row, int64_t holding, L* grad_logit) {
    const int64_t count = fixed ? fixed : holding;
    const Unrolled<A, fixed> scales(row_scales_);
    const Unrolled<const A*, fixed> shares(row_shares_), products(row_products_);
    const A* weight = windows_.weights().row(row) + (covered_.begin - windows_.columns().begin) * depth_;
    const T* input = input_.at(row, covered_.begin);
    T* grad_input = grad_input_.at(row, covered_.begin);
    const int64_t elements = covered_.size() * depth_;
    const auto both = [&](int64_t j, auto lanes, auto&& write) __attribute__((always_inline)) {
      V share(A(0)), product(A(0));
#pragma GCC unroll 4
      for (int64_t o = 0; o < count; ++o) {
        share = multiply_add(V(scales[o]), load(shares[o] + j), share);
        product = multiply_add(V(scales[o]), load(products[o] + j), product);
      }
      const V w = load(weight + j);
      write(grad_input + j, w * share);
      write(grad_logit + j, w * (load(input + j, lanes) * share - product));
    };
    if constexpr (std::is_same_v<T, A> && std::is_same_v<L, A>) {
      const auto address = reinterpret_cast<uintptr_t>(grad_input) | reinterpret_cast<uintptr_t>(grad_logit);
      if (streaming_ && elements % V::size == 0 && address % sizeof(V) == 0) {
        for (int64_t j = 0; j < elements; j += V::size) {
          both(j, Full{}, [](A* to, V value) __attribute__((always_inline)) { store_streaming(to, value); });
        }
        return;
      }
    }
    cover<V::size>(elements, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
      both(j, lanes, [&](auto* to, V value) __attribute__((always_inline)) { store(to, value, lanes); });
    });
  }

  // Add the gradients of a window that the sums could not resolve.
  void add(const Unresolved& u) {
    const Window<T> window(problem_, logit_, input_, u.row, u.column, u.channel);
    const A average = window.average();
    window.each([&](int64_t r, int64_t c) {
      if (r < rows_.begin || r >= rows_.end || c < columns_.begin || c >= columns_.end) return;
      const A grad = u.grad * window.share(r, c);
      const A logit_grad = grad * (window.input_at(r, c) - average);
      T& input_sum = grad_input_.at(r, c)[u.channel];
      input_sum = static_cast<T>(static_cast<A>(input_sum) + grad);
      if (shared_sums_) {
        shared_sums_[(r - rows_.begin) * columns_.size() + c - columns_.begin] += logit_grad;
      } else {
        T& logit_sum = grad_logit_.at(r, c)[logit_.depth > 1 ? u.channel : 0];
        logit_sum = static_cast<T>(static_cast<A>(logit_sum) + logit_grad);
      }
    });
  }

  const LipPool2dProblem& problem_;
  const int64_t depth_;
  const Range columns_, rows_;
  const Range outputs_;  // rows of windows
  Windows<T> windows_;
  const Range covered_;
  std::vector<Range> holding_;  // the outputs that hold each column
  std::vector<int64_t> gaps_;   // columns that none holds
  std::vector<A> spread_, share_, product_;
  const int64_t slots_, slot_elements_;  // rows of windows that may hold one row of the image
  std::vector<A> share_sums_, product_sums_;
  std::vector<int64_t> exponents_;
  std::vector<A> logit_row_, row_scales_;
  std::vector<const A*> row_shares_, row_products_;
  const bool streaming_;
  std::vector<Unresolved> unresolved_;
  Plane<const T> input_, logit_;
  Plane<T> grad_input_, grad_logit_;
  A* shared_sums_ = nullptr;
};

template <typename T>
void backward(const LipPool2dProblem& problem, const T* grad, const T* input, const T* logit, const T* output,
              T* grad_input, T* grad_logit) {
  // Planes that share logits are one piece of work, which adds up their gradients in order.
  const int64_t together = problem.shared ? problem.planes_per_image() : 1;
  const Tasks tasks(problem.planes() / together, problem.width.length, problem.height.length,
                    kTileElements / problem.depth());
  tasks.run([&](Range columns, Range rows) {
    std::vector<Accumulator<T>> sums(together > 1 ? rows.size() * columns.size() : 0);
    return [&, columns, rows, task = Backward<T>(problem, columns, rows), sums](int64_t group) mutable {
      std::fill(sums.begin(), sums.end(), 0);
      const auto grad_logits = problem.logit_plane(grad_logit, group * together);
      for (int64_t plane = group * together; plane < (group + 1) * together; ++plane) {
        task.run(problem.output_plane(grad, plane), problem.input_plane(input, plane),
                 problem.logit_plane(logit, plane), problem.output_plane(output, plane),
                 problem.input_plane(grad_input, plane), grad_logits, together > 1 ? sums.data() : nullptr);
      }
      for (size_t i = 0; i < sums.size(); ++i) {
        *grad_logits.at(rows.begin + i / columns.size(), columns.begin + i % columns.size()) = static_cast<T>(sums[i]);
      }
    };
  });
}
