// Large pages for a contiguous tensor that is about to be written for the first time.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace paper_layers {

// glibc maps large tensors anew each time, and the system hands them over page by page: in pages of 2 MB, where it has
// them, that takes a quarter of the time. Only a hint; errors do not matter.
inline void use_huge_pages(torch::stable::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 1 << 21;
  const auto data = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t begin = (data + page - 1) / page * page;
  const uintptr_t end = (data + tensor.numel() * tensor.element_size()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

}  // namespace paper_layers
