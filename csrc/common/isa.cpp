#include "common/isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <string>

namespace paper_layers {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512"};

Capability detect() {
  Capability best = Capability::baseline;
#ifdef PAPER_LAYERS_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Capability::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      best = Capability::avx512;
    }
  }
#endif
  if (const char* limit = std::getenv("PAPER_LAYERS_CPU_CAPABILITY")) {
    const auto name = std::find(std::begin(kNames), std::end(kNames), std::string(limit));
    if (name != std::end(kNames)) {
      best = std::min(best, static_cast<Capability>(name - std::begin(kNames)));
    }
  }
  return best;
}

std::string cpu_capability_name() { return kNames[static_cast<int>(cpu_capability())]; }

}  // namespace

Capability cpu_capability() {
  static const Capability capability = detect();
  return capability;
}

}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&paper_layers::cpu_capability_name));
}
