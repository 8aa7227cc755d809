// The most uncertain of given points on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <iterator>

#include "common/accumulator.h"
#include "common/bilinear.h"
#include "sample_uncertain_points/problem.h"

#define PAPER_LAYERS_KERNEL "sample_uncertain_points/cpu_kernel.isa.h"
#include "common/for_each_isa.h"

namespace paper_layers {
namespace {

Tensor sample_uncertain_points(const Tensor& logits, const std::optional<Tensor>& labels, const Tensor& points,
                               int64_t count) {
  check_sample_uncertain_points(logits, labels, points, count);
  const LogitMaps maps = sampled_maps(logits);
  const ImageLabels of_image(labels);
  of_image.check(logit_maps(logits));
  const Tensor p = torch::stable::contiguous(points);
  const std::vector<int64_t> shape = {maps.images, count};
  Tensor index = torch::stable::new_empty(logits, shape, ScalarType::Long);
  THO_DISPATCH_V2(logits.scalar_type(), "sample_uncertain_points", AT_WRAP([&] {
                    PAPER_LAYERS_DISPATCH(sample_uncertain_points(
                        maps, logits.const_data_ptr<scalar_t>(), of_image.data(), p.const_data_ptr<float>(), p.size(1),
                        count, index.mutable_data_ptr<int64_t>()));
                  }),
                  ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half);
  return index;
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("sample_uncertain_points", TORCH_BOX(&paper_layers::sample_uncertain_points));
}
