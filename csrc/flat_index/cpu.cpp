// Neighbours within clouds as neighbours in all rows, on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/parallel.h"
#include "flat_index/problem.h"

namespace paper_layers {
namespace {

Tensor flat_index(Tensor index, int64_t rows) {
  const FlatIndexProblem problem = flat_index_problem(index, rows);
  make_contiguous(index);
  const Tensor result = new_flat_index(index);
  const int64_t* const from = index.const_data_ptr<int64_t>();
  int64_t* const to = result.mutable_data_ptr<int64_t>();
  parallel_for(0, problem.clouds, grain_size(65536, {problem.entries}), [&](int64_t begin, int64_t end) {
    for (int64_t cloud = begin; cloud < end; ++cloud) {
      const int64_t first = cloud * problem.entries, start = cloud * rows;
      check_index(from + first, problem.entries, rows);
      for (int64_t i = first; i < first + problem.entries; ++i) to[i] = from[i] < 0 ? -1 : from[i] + start;
    }
  });
  return result;
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) { m.impl("flat_index", TORCH_BOX(&paper_layers::flat_index)); }
