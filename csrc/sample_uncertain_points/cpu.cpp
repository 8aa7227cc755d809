// The most uncertain of given points on the CPU.
#include <torch/csrc/stable/library.h>

#include <iterator>

#include "common/bilinear.h"
#include "sample_uncertain_points/problem.h"

#define PAPER_LAYERS_KERNEL "sample_uncertain_points/cpu_kernel.isa.h"
#include "common/for_each_isa.h"

namespace paper_layers {
namespace {

Tensor sample_uncertain_points(const Tensor& logits, const MaybeTensor& labels, const Tensor& points,
                               int64_t count) {
  check_sample_uncertain_points(logits, labels, points, count);
  const LogitMaps maps = sampled_maps(logits);
  const ImageLabels of_image(labels);
  of_image.check(logit_maps(logits));
  const Tensor p = to_contiguous(points);
  Tensor index = new_empty(logits, {maps.images, count}, ScalarType::Long);
  dispatch(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    PAPER_LAYERS_DISPATCH(sample_uncertain_points(maps, logits.const_data_ptr<T>(), of_image.data(),
                                                  p.const_data_ptr<float>(), p.size(1), count,
                                                  index.mutable_data_ptr<int64_t>()));
  });
  return index;
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("sample_uncertain_points", TORCH_BOX(&paper_layers::sample_uncertain_points));
}
