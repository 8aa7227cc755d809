// Reductions over neighbours' rows on the CPU, compiled once for each instruction set.

// The neighbours of one node: their rows and their columns in the table.
template <typename T>
struct Neighbors {
  std::vector<const T*> rows;
  std::vector<int32_t> columns;

  void select(const T* input, int64_t channels, const int64_t* index, int64_t k) {
    rows.clear();
    columns.clear();
    for (int64_t column = 0; column < k; ++column) {
      if (index[column] < 0) continue;
      rows.push_back(input + index[column] * channels);
      columns.push_back(static_cast<int32_t>(column));
    }
  }
};

template <typename BitLanes>
PAPER_LAYERS_INLINE void store_numbers(int32_t* to, BitLanes lanes, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<int32_t>(lanes[i]);
}
template <typename BitLanes>
PAPER_LAYERS_INLINE void store_numbers(int32_t* to, BitLanes lanes, Full) {
  typedef int32_t Numbers __attribute__((vector_size(sizeof(lanes) / sizeof(lanes[0]) * 4)));
  const Numbers numbers = __builtin_convertvector(lanes, Numbers);
  std::memcpy(to, &numbers, sizeof(numbers));
}

// The largest or smallest, and the column of the first of these; NaN is beyond all others. Less `own`, if not null.
template <bool largest, typename T>
void extreme(const Neighbors<T>& from, int64_t channels, const T* own, T* output, int32_t* arg) {
  using V = Vec<Accumulator<T>>;
  const int64_t count = from.rows.size();
  cover<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    V best = load(from.rows[0] + c, lanes);
    typename V::BitLanes column = from.columns[0] - typename V::BitLanes{};
    for (int64_t r = 1; r < count; ++r) {
      const V x = load(from.rows[r] + c, lanes);
      const auto beyond = largest ? x.lanes > best.lanes : x.lanes < best.lanes;
      const auto better = beyond | ((x.lanes != x.lanes) & (best.lanes == best.lanes));
      best = V(better ? x.lanes : best.lanes);
      column = better ? from.columns[r] - typename V::BitLanes{} : column;
    }
    if (own != nullptr) best = best - V(load(own + c, lanes));
    store(output + c, best, lanes);
    store_numbers(arg + c, column, lanes);
  });
}

template <typename T>
void total(const Neighbors<T>& from, int64_t channels, const T* own, bool mean, T* output) {
  using V = Vec<Accumulator<T>>;
  const V count(static_cast<Accumulator<T>>(from.rows.size()));
  cover<V::size>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    V sum = load(from.rows[0] + c, lanes);
    for (size_t r = 1; r < from.rows.size(); ++r) sum = sum + load(from.rows[r] + c, lanes);
    if (own != nullptr) sum = sum - count * V(load(own + c, lanes));
    store(output + c, mean ? sum / count : sum, lanes);
  });
}

// A channel by itself, with the same results: parts of vectors cost more than numbers where there are few.
constexpr int64_t kFewChannels = 4;

template <typename T>
void reduce_channel(const NeighborReduceProblem& problem, const T* input, const int64_t* index, const T* own, T* output,
                    int32_t* arg) {
  using A = Accumulator<T>;
  const bool extreme = problem.has_arg(), largest = problem.reduce == Reduce::max;
  A result = 0, count = 0;
  int32_t found = -1;
  for (int64_t column = 0; column < problem.k; ++column) {
    if (index[column] < 0) continue;
    const A x = static_cast<A>(input[index[column] * problem.channels]);
    count += 1;
    if (!extreme) {
      result = count == 1 ? x : result + x;
    } else if (found < 0 || (largest ? x > result : x < result) || (x != x && result == result)) {
      result = x;
      found = static_cast<int32_t>(column);
    }
  }
  if (own != nullptr && count > 0) result = result - (extreme ? A(1) : count) * static_cast<A>(*own);
  *output = static_cast<T>(problem.reduce == Reduce::mean && count > 0 ? result / count : result);
  if (extreme) *arg = found;
}

template <typename T>
void neighbor_reduce(const NeighborReduceProblem& problem, const T* input, const int64_t* index, T* output, int32_t* arg) {
  const int64_t channels = problem.channels, k = problem.k;
  parallel_for(0, problem.nodes, grain_size(32768, {channels, k}), [&](int64_t begin, int64_t end) {
    Neighbors<T> from;
    for (int64_t i = begin; i < end; ++i) {
      const T* const rows = input + problem.start(i) * channels;
      const T* const own = problem.relative ? input + i * channels : nullptr;
      T* const out = output + i * channels;
      if (channels <= kFewChannels) {
        for (int64_t c = 0; c < channels; ++c) {
          reduce_channel(problem, rows + c, index + i * k, own == nullptr ? own : own + c, out + c,
                         problem.has_arg() ? arg + i * channels + c : nullptr);
        }
        continue;
      }
      from.select(rows, channels, index + i * k, k);
      if (from.rows.empty()) {
        std::fill_n(out, channels, T(0));
        if (problem.has_arg()) std::fill_n(arg + i * channels, channels, -1);
      } else if (problem.reduce == Reduce::max) {
        extreme<true>(from, channels, own, out, arg + i * channels);
      } else if (problem.reduce == Reduce::min) {
        extreme<false>(from, channels, own, out, arg + i * channels);
      } else {
        total(from, channels, own, problem.reduce == Reduce::mean, out);
      }
    }
  });
}

// Threads share out the channels: no two write to one element, and each adds in the order of the table.
template <typename T>
void neighbor_reduce_backward(const NeighborReduceProblem& problem, const T* grad, const int64_t* index,
                              const int32_t* arg, T* grad_input) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t channels = problem.channels, k = problem.k;
  parallel_for(0, (channels + line - 1) / line, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * line, last = std::min(channels, end * line), size = last - first;
    for (int64_t row = 0; row < problem.rows; ++row) std::fill_n(grad_input + row * channels + first, size, T(0));
    // The row of each column's gradient; for a missing neighbour it is `nowhere`.
    Scratch<T> nowhere(channels);
    std::vector<T*> rows(k);
    for (int64_t i = 0; i < problem.nodes; ++i) {
      const T* from = grad + i * channels;
      T* own = grad_input + i * channels;
      const int64_t start = problem.start(i);
      int64_t count = 0;
      for (int64_t column = 0; column < k; ++column) {
        const int64_t row = index[i * k + column];
        rows[column] = row < 0 ? nowhere.data() : grad_input + (start + row) * channels;
        count += row >= 0;
      }
      if (count == 0) continue;
      if (problem.has_arg()) {
        for (int64_t c = first; c < last; ++c) {
          const uint64_t column = arg[i * channels + c];
          T* to = column < static_cast<uint64_t>(k) ? rows[column] : nowhere.data();
          to[c] += from[c];
        }
        for (int64_t c = first; problem.relative && c < last; ++c) own[c] -= from[c];
        continue;
      }
      const T divisor = problem.reduce == Reduce::mean ? T(count) : T(1);
      for (T* to : rows) {
        if (to == nowhere.data()) continue;
        for (int64_t c = first; c < last; ++c) to[c] += from[c] / divisor;
      }
      for (int64_t c = first; problem.relative && c < last; ++c) own[c] -= from[c] * (T(count) / divisor);
    }
  });
}
