// Running statistics of several norms on the CPU.
#include <torch/csrc/stable/library.h>

#include "common/cpu_running_statistics.h"

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("move_running_statistics_", TORCH_BOX(&paper_layers::move_running_statistics));
}
