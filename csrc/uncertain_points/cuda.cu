// The most uncertain pixels on the GPU: a thread a pixel reads its classes and writes one integer, its margin above its
// place, and the smallest of these are the result. Nothing is read back to the host.

#include "common/cuda_uncertainty.cuh"

#include <algorithm>

#include "uncertain_points/problem.h"

namespace paper_layers {
namespace {

template <typename T, typename Index_>
struct PixelMargin {
  using Index = Index_;

  LogitMaps maps;
  FirstClass first_class;
  const T* logits;

  C10_DEVICE Accumulator<T> operator()(int64_t image, int64_t pixel) const {
    const T* from = logits + image * maps.image_stride + first_class(image) * maps.class_stride +
                    pixel * maps.pixel_stride();
    const int64_t classes = first_class.labels != nullptr ? 1 : maps.classes;
    Margin<Accumulator<T>> margin;
#pragma unroll 8
    for (int64_t c = 0; c < classes; ++c) margin.add(from[c * maps.class_stride]);
    return margin.of(classes);
  }
};

Tensor uncertain_points(const Tensor& any_logits, const MaybeTensor& labels, int64_t num_points) {
  check_uncertain_points(any_logits, labels, num_points);
  const torch::stable::accelerator::DeviceGuard guard(any_logits.get_device_index());
  const Tensor logits = with_flat_pixels(any_logits);
  const LogitMaps maps = logit_maps(logits);
  const ImageLabels of_image(labels);
  const FirstClass first_class{of_image.data(), maps.classes};
  const int64_t wanted = std::min(num_points, maps.pixels());
  Tensor result;
  dispatch(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    result = with_index(maps.images * maps.pixels(), [&](auto index) {
      return smallest_margins<Accumulator<T>>(
          logits, maps.images, maps.pixels(), wanted,
          PixelMargin<T, decltype(index)>{maps, first_class, logits.const_data_ptr<T>()});
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CUDA, m) {
  m.impl("uncertain_points", TORCH_BOX(&uncertain_points));
}

}  // namespace paper_layers
