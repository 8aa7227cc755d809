// Products of sizes. A tensor without elements may have sizes of any magnitude.
#pragma once

#include <cstdint>
#include <initializer_list>

#include <torch/headeronly/util/Exception.h>

namespace paper_layers {

// An error where the product does not fit: a wrapped one would be taken for a small one.
inline int64_t checked_product(std::initializer_list<int64_t> sizes) {
  int64_t result = 1;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(!__builtin_mul_overflow(result, size, &result), "sizes: expected a product below 2^63, got ",
                    result, " after a factor of ", size);
  }
  return result;
}

// The least number of items for a thread to have `work` operations; each item has the product of `costs`, which
// may be beyond 64 bits.
inline int64_t grain_size(double work, std::initializer_list<int64_t> costs) {
  double cost = 1;
  for (const int64_t factor : costs) cost *= static_cast<double>(factor);
  return 1 + static_cast<int64_t>(work / (1 + cost));
}

}  // namespace paper_layers
