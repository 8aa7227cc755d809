// The instruction set of the CPU kernels.
#pragma once

#if defined(__x86_64__)
#define PAPER_LAYERS_X86
#include <immintrin.h>
#endif

// Instrumented loops are not unrolled: that would take the compiler many minutes.
#ifdef __SANITIZE_ADDRESS__
#define PAPER_LAYERS_UNROLL
#else
#define PAPER_LAYERS_UNROLL _Pragma("GCC unroll 4")
#endif

namespace paper_layers {

enum class Capability { baseline, avx2, avx512 };

// The best set that this processor has, or a lesser one named by PAPER_LAYERS_CPU_CAPABILITY
// (default, avx2, avx512) when the library was loaded.
Capability cpu_capability();

}  // namespace paper_layers
