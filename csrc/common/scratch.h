// Memory that kernels compute in: a vector that starts at a cache line, so that no whole vector of it crosses one.
#pragma once

#include <new>
#include <vector>

namespace paper_layers {

template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t line{64};

  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), line)); }
  void deallocate(T* p, size_t) { ::operator delete(p, line); }
  friend bool operator==(LineAllocator, LineAllocator) { return true; }
  friend bool operator!=(LineAllocator, LineAllocator) { return false; }
};

template <typename T>
using Scratch = std::vector<T, LineAllocator<T>>;

}  // namespace paper_layers
