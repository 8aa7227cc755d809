// Compiles PAPER_LAYERS_KERNEL, an .isa.h, once for each instruction set, each time in a namespace of its own;
// PAPER_LAYERS_DISPATCH calls the one that this processor runs. Include ordinary headers that the kernel needs before
// this one: a header first seen inside would be compiled for one instruction set.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/sizes.h"

namespace paper_layers {

namespace isa_default {
#define PAPER_LAYERS_VECTOR_BYTES 16
#include "common/vec.isa.h"
#include PAPER_LAYERS_KERNEL
#undef PAPER_LAYERS_VECTOR_BYTES
}  // namespace isa_default

#ifdef PAPER_LAYERS_X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace isa_avx2 {
#define PAPER_LAYERS_VECTOR_BYTES 32
#include "common/vec.isa.h"
#include PAPER_LAYERS_KERNEL
#undef PAPER_LAYERS_VECTOR_BYTES
}  // namespace isa_avx2
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
namespace isa_avx512 {
#define PAPER_LAYERS_VECTOR_BYTES 64
#include "common/vec.isa.h"
#include PAPER_LAYERS_KERNEL
#undef PAPER_LAYERS_VECTOR_BYTES
}  // namespace isa_avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define PAPER_LAYERS_DISPATCH(call)                        \
  switch (cpu_capability()) {                              \
    case Capability::avx512: isa_avx512::call; break;      \
    case Capability::avx2: isa_avx2::call; break;          \
    case Capability::baseline: isa_default::call; break;   \
  }
#else
#define PAPER_LAYERS_DISPATCH(call) isa_default::call
#endif

}  // namespace paper_layers
