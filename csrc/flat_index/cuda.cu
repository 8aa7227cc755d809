// Neighbours within clouds as neighbours in all rows, on the GPU: a thread an entry of the table.

#include "common/cuda_utils.cuh"

#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "flat_index/problem.h"

namespace paper_layers {
namespace {

// As in torch's own indexing, a row out of range stops the device's work with an assertion: the host could not know of
// it without waiting. It becomes -1, not a row of the next cloud.
struct FlatIndex {
  const int64_t* index;
  int64_t entries, rows;
  int64_t* to;

  C10_DEVICE void operator()(int64_t i) const {
    const int64_t row = index[i];
    CUDA_KERNEL_ASSERT(-1 <= row && row < rows && "index: out of range");
    to[i] = row < 0 || row >= rows ? -1 : row + i / entries * rows;
  }
};

Tensor flat_index(Tensor index, int64_t rows) {
  const FlatIndexProblem problem = flat_index_problem(index, rows);
  const int32_t device = index.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  make_contiguous(index);
  const Tensor result = new_flat_index(index);
  for_each_index<int64_t>(result.numel(), device,
                          FlatIndex{index.const_data_ptr<int64_t>(), std::max<int64_t>(1, problem.entries), rows,
                                    result.mutable_data_ptr<int64_t>()});
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CUDA, m) { m.impl("flat_index", TORCH_BOX(&flat_index)); }

}  // namespace paper_layers
