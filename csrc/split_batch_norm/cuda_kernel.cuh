// The kernels of split_batch_norm on the GPU: sums of parts of a split, their totals, and what is done to each element.
#pragma once

#include "common/cuda_tensors.cuh"

#include <algorithm>
#include <cstdint>

#include "split_batch_norm/problem.h"

namespace paper_layers {
namespace {

// Splits that one launch takes, which kernels are given by value; there may be more launches.
constexpr int kSplits = 16;

// Images of some splits, in parts. Values (S, C), and images, are counted from the first one of these splits.
struct Splits {
  int count;
  int64_t images[kSplits + 1], parts[kSplits + 1];  // The first of each split, and the end.

  C10_DEVICE int of(const int64_t (&starts)[kSplits + 1], int64_t at) const {
    int split = 0;
    while (split + 1 < count && at >= starts[split + 1]) ++split;
    return split;
  }
};

// Elements in packs of V, which lie in runs: the pixels of a plane, or the channels of a row.
template <typename Index_, int V_, bool rows_>
struct Elements {
  using Index = Index_;
  static constexpr int V = V_;
  static constexpr bool rows = rows_;
  static constexpr int values = rows ? V : 1;  // Channels of a pack.

  Index channels, run, runs;  // Packs of a run, and runs of an image.
  Divider<Index> by_run, by_runs;

  explicit Elements(const SplitBatchNormProblem& problem)
      : channels(static_cast<Index>(problem.channels)),
        run(static_cast<Index>((rows ? problem.channels : problem.pixels) / V)),
        runs(static_cast<Index>(rows ? problem.pixels : problem.channels)),
        by_run(std::max<int64_t>(run, 1)),
        by_runs(std::max<int64_t>(runs, 1)) {}

  // The place of a pack's values among the values of splits and channels.
  C10_DEVICE Index values_at(const Splits& splits, Index pack) const {
    const Index of_run = by_run(pack), image = by_runs(of_run);
    const Index channel = rows ? (pack - of_run * run) * V : of_run - image * channels;
    return splits.of(splits.images, image) * channels + channel;
  }
};

// The values of a pack's channels: one for all, or one each.
template <typename E, typename A>
C10_DEVICE Pack<A, E::V> values_of_pack(const A* values, typename E::Index at) {
  if constexpr (E::rows) {
    return *reinterpret_cast<const Pack<A, E::V>*>(values + at);
  } else {
    Pack<A, E::V> result;
    for (int v = 0; v < E::V; ++v) result[v] = values[at];
    return result;
  }
}

// Number, mean and sum of squared deviations of some values.
template <typename A>
struct Moments {
  A count = 0, mean = 0, squares = 0;

  // Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983.
  template <typename B>
  C10_DEVICE void merge(const Moments<B>& other) {
    if (other.count == 0) return;
    const A total = count + A(other.count), delta = A(other.mean) - mean, share = A(other.count) / total;
    mean += delta * share;
    squares += A(other.squares) + delta * delta * (count * share);
    count = total;
  }
};

// Sums of grad times the input's deviation, and of grad.
template <typename A>
struct Sums {
  A product = 0, grad = 0;

  template <typename B>
  C10_DEVICE void merge(const Sums<B>& other) {
    product += A(other.product);
    grad += A(other.grad);
  }
};

// The moments of what a thread reads, relative to the first value of the split: then an offset that all values have
// costs no digits of the mean. Deviations are from the mean of the packs before, which is taken anew when their number
// has doubled, and from then on after a few: then no value that is far from the others costs digits of the variance.
template <typename T, typename E>
struct ThreadMoments {
  using A = Accumulator<T>;
  using Total = Moments<A>;
  using Wide = Moments<double>;
  static constexpr int M = E::values;
  struct Source {
    const Pack<T, E::V>* input;
  };

  static constexpr int kPacks = 16, kValues = E::V / M;

  A origin[M], mean[M] = {}, squares[M] = {}, sum[M] = {}, square[M] = {}, count = 0;
  int packs = 0, next = 1;  // Packs since the mean was taken, and when it is next.

  C10_DEVICE ThreadMoments(const Source& source, typename E::Index first_of_split, typename E::Index) {
    for (int m = 0; m < M; ++m) origin[m] = source.input[first_of_split][m];
  }
  C10_DEVICE void add(const Source& source, typename E::Index at) {
    const Pack<T, E::V> x = source.input[at];
    for (int m = 0; m < M; ++m) mean[m] = count == 0 && packs == 0 ? A(x[m]) - origin[m] : mean[m];
    for (int v = 0; v < E::V; ++v) {
      const int m = v % M;
      const A deviation = A(x[v]) - origin[m] - mean[m];
      sum[m] += deviation;
      square[m] += deviation * deviation;
    }
    if (++packs == next) take_mean();
  }
  C10_DEVICE Total total(int m) {
    take_mean();
    return {count, mean[m], squares[m]};
  }

 private:
  C10_DEVICE void take_mean() {
    if (packs == 0) return;
    count += A(packs * kValues);
    const A share = 1 / count;
    for (int m = 0; m < M; ++m) {
      const A change = sum[m] * share, more = square[m] - sum[m] * change;
      mean[m] += change;
      squares[m] += more < 0 ? A(0) : more;
      sum[m] = square[m] = 0;
    }
    next = packs < kPacks && count > A(kValues) ? 2 * packs : packs;
    packs = 0;
  }
};

template <typename T, typename E>
struct ThreadSums {
  using A = Accumulator<T>;
  using Total = Sums<A>;
  using Wide = Sums<double>;
  static constexpr int M = E::values;
  struct Source {
    const Pack<T, E::V>*grad, *input;
    const A* mean;
  };

  A center[M], product[M] = {}, sum[M] = {};

  C10_DEVICE ThreadSums(const Source& source, typename E::Index, typename E::Index values) {
    for (int m = 0; m < M; ++m) center[m] = source.mean[values + m];
  }
  C10_DEVICE void add(const Source& source, typename E::Index at) {
    const Pack<T, E::V> g = source.grad[at], x = source.input[at];
    for (int v = 0; v < E::V; ++v) {
      const int m = v % M;
      product[m] += A(g[v]) * (A(x[v]) - center[m]);
      sum[m] += A(g[v]);
    }
  }
  C10_DEVICE Total total(int m) const { return {product[m], sum[m]}; }
};

// Sums each column of a block's threads, a power of two of columns; the total of column t is in shared[t].
template <typename Total>
C10_DEVICE void merge_columns(Total* shared, const Total& mine, int columns) {
  __syncthreads();  // All have read what was there.
  shared[threadIdx.x] = mine;
  for (int step = kThreads / 2; step >= columns; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) shared[threadIdx.x].merge(shared[threadIdx.x + step]);
  }
  __syncthreads();
}

// A block takes some columns, which are packs of channels, or a channel, of a part: of consecutive rows, or packs of
// planes, `length` of them.
struct Grid {
  int columns;
  int64_t column_blocks, length;
};

template <typename Thread, typename E>
__global__ void __launch_bounds__(kThreads)
    totals_of_parts(const __grid_constant__ Splits splits, const __grid_constant__ E elements, Grid grid,
                    typename Thread::Source source, typename Thread::Total* totals) {
  using Index = typename E::Index;
  alignas(16) __shared__ char memory[kThreads * sizeof(typename Thread::Total)];
  auto* shared = reinterpret_cast<typename Thread::Total*>(memory);

  const int64_t part = blockIdx.x / grid.column_blocks;
  const int split = splits.of(splits.parts, part);
  const Index column = static_cast<Index>((blockIdx.x - part * grid.column_blocks) * grid.columns) +
                       threadIdx.x % grid.columns;
  const Index channel = column * E::values;
  const bool inside = channel < elements.channels;
  const int64_t image = splits.images[split], packs = int64_t(elements.run) * elements.runs;
  // The first pack of the split in the column; a split with parts is not empty.
  const Index first = static_cast<Index>(image * packs) + (inside ? (E::rows ? column : column * elements.run) : 0);
  const int64_t units = (splits.images[split + 1] - image) * (E::rows ? elements.runs : elements.run);
  const int64_t begin = (part - splits.parts[split]) * grid.length;
  const Index end = static_cast<Index>(begin + grid.length < units ? begin + grid.length : units);

  Thread mine(source, first, split * elements.channels + (inside ? channel : 0));
  const Index step = kThreads / grid.columns;
  for (Index u = static_cast<Index>(begin) + threadIdx.x / grid.columns; inside && u < end; u += step) {
    if constexpr (E::rows) {
      mine.add(source, first + u * elements.run);
    } else {
      const Index plane = elements.by_run(u);
      mine.add(source, first + plane * static_cast<Index>(packs) + (u - plane * elements.run));
    }
  }
  for (int m = 0; m < E::values; ++m) {
    merge_columns(shared, mine.total(m), grid.columns);
    if (inside && threadIdx.x < grid.columns) totals[part * elements.channels + channel + m] = shared[threadIdx.x];
  }
}

// Calls finish(value, total) for each split and channel, with the parts merged in double.
constexpr int kColumns = 8;

template <typename Total, typename Wide, typename Finish>
__global__ void __launch_bounds__(kThreads)
    totals_of_splits(const __grid_constant__ Splits splits, int64_t channels, const Total* totals,
                     const __grid_constant__ Finish finish) {
  alignas(16) __shared__ char memory[kThreads * sizeof(Wide)];
  auto* shared = reinterpret_cast<Wide*>(memory);
  const int64_t value = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const bool inside = value < splits.count * channels;
  const int split = inside ? static_cast<int>(value / channels) : 0;
  const int64_t channel = value - split * channels;
  Wide mine;
  const int64_t end = splits.parts[split + 1];
  for (int64_t part = splits.parts[split] + threadIdx.x / kColumns; inside && part < end; part += kThreads / kColumns) {
    mine.merge(totals[part * channels + channel]);
  }
  merge_columns(shared, mine, kColumns);
  if (inside && threadIdx.x < kColumns) finish(value, shared[threadIdx.x]);
}

}  // namespace
}  // namespace paper_layers
