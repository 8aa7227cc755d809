// Torch's parallel_for with the error of the thread that failed: torch's own says only that a call failed.
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>

#include <torch/csrc/stable/ops.h>

namespace paper_layers {

template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain_size, const Body& body) {
  std::exception_ptr error;
  std::mutex mutex;
  torch::stable::parallel_for(begin, end, grain_size, [&](int64_t first, int64_t last) {
    try {
      body(first, last);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace paper_layers
