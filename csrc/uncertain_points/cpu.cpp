// The most uncertain pixels on the CPU.
#include <torch/csrc/stable/library.h>

#include <iterator>

#include "uncertain_points/problem.h"

#define PAPER_LAYERS_KERNEL "uncertain_points/cpu_kernel.isa.h"
#include "common/for_each_isa.h"

namespace paper_layers {
namespace {

Tensor uncertain_points(const Tensor& logits, const MaybeTensor& labels, int64_t num_points) {
  check_uncertain_points(logits, labels, num_points);
  const Tensor x = with_flat_pixels(logits);
  const LogitMaps maps = logit_maps(x);
  const ImageLabels of_image(labels);
  of_image.check(maps);
  const int64_t count = std::min(num_points, maps.pixels());
  Tensor index = new_empty(x, {maps.images, count}, ScalarType::Long);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    PAPER_LAYERS_DISPATCH(uncertain_points(maps, x.const_data_ptr<T>(), of_image.data(), count,
                                           index.mutable_data_ptr<int64_t>()));
  });
  return index;
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("uncertain_points", TORCH_BOX(&paper_layers::uncertain_points));
}
