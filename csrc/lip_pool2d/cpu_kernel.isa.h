// The CPU kernels of local importance-based pooling, compiled once for each instruction set.
#include "common/exp.isa.h"
#include "lip_pool2d/cpu_weights.isa.h"
#include "lip_pool2d/cpu_planar.isa.h"
#include "lip_pool2d/cpu_channels_last.isa.h"

// Tells if all sums of weights are precise.
template <typename A>
struct Resolved {
  typename Vec<A>::BitLanes too_small = {};
  PAPER_LAYERS_INLINE void look_at(Vec<A> sums, Full) { too_small |= ~(sums.lanes >= Vec<A>(A(kSmallestSum)).lanes); }
  PAPER_LAYERS_INLINE void look_at(Vec<A> sums, int64_t n) {
    for (int64_t i = n; i < sums.size; ++i) sums.lanes[i] = 1;
    look_at(sums, Full{});
  }
  bool all() const { return lanes_set(too_small) == 0; }
};

template <typename Windows>
std::vector<typename Windows::A> weight_sums(Windows& windows, int64_t output_row, int64_t depth) {
  using A = typename Windows::A;
  std::vector<A> sums(windows.outputs().size() * depth);
  windows.template sum<false>(output_row, [&](int64_t i, auto lanes, Vec<A> weights, Vec<A>) {
    store(sums.data() + i, weights, lanes);
  });
  return sums;
}

// Calls body(element, column, channel) for the windows of a row whose sums are not.
template <typename Windows, typename Body>
void each_unresolved(Windows& windows, int64_t output_row, int64_t depth, Body&& body) {
  using A = typename Windows::A;
  const std::vector<A> sums = weight_sums(windows, output_row, depth);
  for (size_t i = 0; i < sums.size(); ++i) {
    if (!(sums[i] >= A(kSmallestSum))) body(i, windows.outputs().begin + i / depth, i % depth);
  }
}

// The work in pieces: for each tile of columns and band of rows, every plane, so that scratch serves many.
struct Tasks {
  int64_t planes, columns, rows, depth, tile, band, tiles, bands;

  Tasks(int64_t planes, int64_t columns, int64_t rows, int64_t depth, int64_t tile_columns)
      : planes(planes), columns(columns), rows(rows), depth(depth) {
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
    parallel_for(0, planes * tiles * bands, 1 + kGrainElements / (tile * band * depth), [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t stop = std::min(end, (begin / planes + 1) * planes);
        auto piece = work(tile_at(begin), band_at(begin));
        for (; begin < stop; ++begin) piece(begin % planes);
      }
    });
  }
};

template <typename Windows>
class Forward {
  using T = typename Windows::Element;
  using A = Accumulator<T>;
  using V = Vec<A>;

 public:
  Forward(const LipPool2dProblem& problem, Range columns, Range rows)
      : problem_(problem), rows_(rows), windows_(problem, columns) {}

  void run(Plane<const T> input, Plane<const T> logit, Plane<T> output) {
    windows_.begin(logit, input);
    for (int64_t o = rows_.begin; o < rows_.end; ++o) {
      T* out = output.at(o, windows_.outputs().begin);
      Resolved<A> resolved;
      windows_.template sum<true>(o, [&](int64_t i, auto lanes, V weights, V values) __attribute__((always_inline)) {
        resolved.look_at(weights, lanes);
        store(out + i, values / weights, lanes);
      });
      if (resolved.all()) continue;
      each_unresolved(windows_, o, output.depth, [&](int64_t i, int64_t column, int64_t channel) {
        out[i] = static_cast<T>(Window<T>(problem_, logit, input, o, column, channel).average());
      });
    }
  }

 private:
  const LipPool2dProblem& problem_;
  const Range rows_;
  Windows windows_;
};

template <typename Windows, typename T>
void forward(const LipPool2dProblem& problem, const T* input, const T* logit, T* output) {
  const Tasks tasks(problem.planes(), problem.width.outputs, problem.height.outputs, problem.depth(),
                    kTileElements / (problem.depth() * problem.width.stride));
  tasks.run([&](Range columns, Range rows) {
    return [&, task = Forward<Windows>(problem, columns, rows)](int64_t plane) mutable {
      task.run(problem.input_plane(input, plane), problem.logit_plane(logit, plane), problem.output_plane(output, plane));
    };
  });
}

// Gradients of some rows and columns of the input, streamed down the rows of windows that reach them.
// With the gradient's share of a window s = g / sum(weights) and its product with the output, t = s * out,
// dx = weight * sum(s) and dl = weight * (x * sum(s) - sum(t)), sums over the windows that hold the pixel. Half types
// average again: the error of a rounded output adds up over a window, while the gradients of its logits cancel.
template <typename Windows, typename Shares>
class Backward {
  using T = typename Windows::Element;
  using A = Accumulator<T>;
  using V = Vec<A>;
  static constexpr bool averages = !std::is_same_v<T, A>;

 public:
  Backward(const LipPool2dProblem& problem, Range columns, Range rows)
      : problem_(problem),
        depth_(problem.depth()),
        columns_(columns),
        rows_(rows),
        outputs_(problem.height.reaching(rows)),
        windows_(problem, problem.width.reaching(columns)),
        covered_(intersection(columns, windows_.columns())),
        shares_(problem, windows_.outputs(), covered_),
        exponents_(problem.height.covering_at_most()),
        row_scales_(exponents_.size()),
        input_row_(covered_.size() * depth_ + V::size),
        logit_row_(input_row_.size()),
        unresolved_(exponents_.size()),
        streaming_(problem.planes() * problem.height.length * problem.width.length * depth_ * int64_t(sizeof(T)) >
                   kStreamingBytes) {
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      if (problem.width.covering(j).size() == 0) gaps_.push_back(j);
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
    int64_t row = rows_.begin;
    for (int64_t o = outputs_.begin; o < outputs_.end; ++o) {
      share(grad, output, o);
      for (; row < rows_.end && problem_.height.covering(row).end <= o + 1; ++row) finish(row);
    }
    for (; row < rows_.end; ++row) finish(row);
    if (streaming_) finish_streaming();
  }

 private:
  struct Unresolved {
    Window<T> window;
    A grad;
  };

  // The gradient's share of each window in a row of them.
  void share(Plane<const T> grad_plane, Plane<const T> output_plane, int64_t o) {
    const T* grad = grad_plane.at(o, windows_.outputs().begin);
    const T* output = output_plane.at(o, windows_.outputs().begin);
    A *shares = shares_.share(o), *products = shares_.product(o);
    Resolved<A> resolved;
    const auto write = [&](int64_t i, auto lanes, V weights, V values) __attribute__((always_inline)) {
      resolved.look_at(weights, lanes);
      const V share = load(grad + i, lanes) / weights;
      store(shares + i, share, lanes);
      V average;
      if constexpr (averages) average = values / weights;
      else average = load(output + i, lanes);
      store(products + i, share * average, lanes);
    };
    exponents_[o % exponents_.size()] = windows_.template sum<averages>(o, write);
    std::vector<Unresolved>& unresolved = unresolved_at(o);
    unresolved.clear();
    if (!resolved.all()) {
      each_unresolved(windows_, o, depth_, [&](int64_t i, int64_t column, int64_t channel) {
        shares[i] = products[i] = 0;
        unresolved.push_back({{problem_, logit_, input_, o, column, channel}, static_cast<A>(grad[i])});
      });
    }
    shares_.keep(o);
  }

  // Write a row of gradients once all windows that hold it are known.
  void finish(int64_t row) {
    const Range holding = problem_.height.covering(row);
    if (holding.size() == 0) {
      for (int64_t j = columns_.begin; j < columns_.end; ++j) clear(row, j);
      return;
    }
    T* grad_input = grad_input_.at(row, covered_.begin);
    bool resolved = true;
    for (int64_t o = holding.begin; o < holding.end; ++o) resolved &= unresolved_at(o).empty();
    if (!resolved) {
      // Gradients are summed in A before they are rounded to T.
      gradients(row, holding, input_row_.data(), logit_row_.data());
      for (int64_t o = holding.begin; o < holding.end; ++o) {
        for (const Unresolved& window : unresolved_at(o)) add(window, row);
      }
      store_row(input_row_.data(), grad_input);
      write_logit_row(row);
    } else if (shared_sums_ || logit_.depth != depth_) {
      gradients(row, holding, grad_input, logit_row_.data());
      write_logit_row(row);
    } else {
      gradients(row, holding, grad_input, grad_logit_.at(row, covered_.begin));
    }
    for (const int64_t j : gaps_) clear(row, j);
  }

  void store_row(const A* from, T* to) const {
    cover<V::size>(covered_.size() * depth_, [&](int64_t i, auto lanes) { store(to + i, load(from + i), lanes); });
  }

  void write_logit_row(int64_t row) {
    if (shared_sums_) {
      A* sums = shared_sums_ + (row - rows_.begin) * columns_.size() - columns_.begin;
      for (int64_t j = covered_.begin; j < covered_.end; ++j) sums[j] += logit_row_[j - covered_.begin];
    } else if (logit_.depth != depth_) {
      for (int64_t j = covered_.begin; j < covered_.end; ++j) {
        *grad_logit_.at(row, j) = static_cast<T>(sum(logit_row_.data() + (j - covered_.begin) * depth_, depth_));
      }
    } else {
      store_row(logit_row_.data(), grad_logit_.at(row, covered_.begin));
    }
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

  template <typename I, typename L>
  void gradients(int64_t row, Range holding, I* grad_input, L* grad_logit) {
    if (logit_.depth != depth_) gradients<true>(row, holding, grad_input, grad_logit);
    else gradients<false>(row, holding, grad_input, grad_logit);
  }

  template <bool one_weight_a_pixel, typename I, typename L>
  void gradients(int64_t row, Range holding, I* grad_input, L* grad_logit) {
    for (int64_t o = holding.begin; o < holding.end; ++o) {
      const int64_t exponent = exponents_[o % exponents_.size()];
      row_scales_[o - holding.begin] = power_of_two(windows_.weights().exponent(row) - exponent);
    }
    const A* weights =
        windows_.weights().row(row) + (covered_.begin - windows_.columns().begin) * (one_weight_a_pixel ? 1 : depth_);
    const T* input = input_.at(row, covered_.begin);
    const auto gather = [&](auto&& write) __attribute__((always_inline)) {
      shares_.gather(holding, row_scales_, [&](int64_t i, int64_t pixel, auto lanes, V share, V product)
          __attribute__((always_inline)) {
        const V weight = one_weight_a_pixel ? V(weights[pixel]) : load(weights + i);
        write(grad_input + i, weight * share, lanes);
        write(grad_logit + i, weight * (load(input + i, lanes) * share - product), lanes);
      });
    };
    if constexpr (std::is_same_v<I, A> && std::is_same_v<L, A>) {
      const auto address = reinterpret_cast<uintptr_t>(grad_input) | reinterpret_cast<uintptr_t>(grad_logit);
      if (streaming_ && covered_.size() * depth_ % V::size == 0 && (depth_ == 1 || depth_ % V::size == 0) &&
          address % sizeof(V) == 0) {
        gather([](A* to, V value, auto) __attribute__((always_inline)) { store_streaming(to, value); });
        return;
      }
    }
    gather([](auto* to, V value, auto lanes) __attribute__((always_inline)) { store(to, value, lanes); });
  }

  std::vector<Unresolved>& unresolved_at(int64_t o) { return unresolved_[o % unresolved_.size()]; }

  // Add the gradients of a window that the sums could not resolve to a row of them.
  void add(const Unresolved& unresolved, int64_t row) {
    const Window<T>& window = unresolved.window;
    const Range columns = intersection(window.columns, covered_);
    const A average = window.average();
    for (int64_t c = columns.begin; c < columns.end; ++c) {
      const int64_t i = (c - covered_.begin) * depth_ + window.channel;
      const A grad = unresolved.grad * window.share(row, c);
      input_row_[i] += grad;
      logit_row_[i] += grad * (window.input_at(row, c) - average);
    }
  }

  const LipPool2dProblem& problem_;
  const int64_t depth_;
  const Range columns_, rows_;
  const Range outputs_;  // rows of windows
  Windows windows_;
  const Range covered_;
  Shares shares_;
  std::vector<int64_t> gaps_;  // columns that no window holds
  std::vector<int64_t> exponents_;
  std::vector<A> row_scales_;
  Scratch<A> input_row_, logit_row_;
  std::vector<std::vector<Unresolved>> unresolved_;  // by row of windows, as the exponents
  const bool streaming_;
  Plane<const T> input_, logit_;
  Plane<T> grad_input_, grad_logit_;
  A* shared_sums_ = nullptr;
};

template <typename Windows, typename Shares, typename T>
void backward(const LipPool2dProblem& problem, const T* grad, const T* input, const T* logit, const T* output,
              T* grad_input, T* grad_logit) {
  // Planes that share logits are one piece of work, which adds up their gradients in order.
  const int64_t together = problem.shared ? problem.planes_per_image() : 1;
  const Tasks tasks(problem.planes() / together, problem.width.length, problem.height.length, problem.depth(),
                    kTileElements / problem.depth());
  tasks.run([&](Range columns, Range rows) {
    std::vector<Accumulator<T>> sums(together > 1 ? rows.size() * columns.size() : 0);
    return [&, columns, rows, task = Backward<Windows, Shares>(problem, columns, rows), sums](int64_t group) mutable {
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

#include "lip_pool2d/cpu_packed.isa.h"

template <typename T>
void forward(const LipPool2dProblem& problem, const T* input, const T* logit, T* output) {
  if (is_packed(problem)) {
    PackedPlanes<T>::for_each_group(
        problem, [&](auto& planes, int64_t group) { planes.forward(group, input, logit, output); });
  } else if (problem.channels_last) forward<ChannelsLastWindows<T>>(problem, input, logit, output);
  else forward<PlanarWindows<T>>(problem, input, logit, output);
}

template <typename T>
void backward(const LipPool2dProblem& problem, const T* grad, const T* input, const T* logit, const T* output,
              T* grad_input, T* grad_logit) {
  if (is_packed(problem)) {
    PackedPlanes<T>::for_each_group(problem, [&](auto& planes, int64_t group) {
      planes.backward(group, grad, input, logit, grad_input, grad_logit);
    });
  } else if (problem.channels_last) {
    backward<ChannelsLastWindows<T>, ChannelsLastShares<T>>(problem, grad, input, logit, output, grad_input, grad_logit);
  } else {
    backward<PlanarWindows<T>, PlanarShares<T>>(problem, grad, input, logit, output, grad_input, grad_logit);
  }
}
