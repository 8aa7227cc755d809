// Running statistics of several norms on the GPU.

#include "common/cuda_running_statistics.cuh"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CUDA, m) {
  m.impl("move_running_statistics_", TORCH_BOX(&paper_layers::move_running_statistics));
}
