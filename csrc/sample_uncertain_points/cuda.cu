// The most uncertain of given points on the GPU: a thread a point samples the classes that count and writes one
// integer, its margin above its number, and the smallest of these are the result. Nothing is read back to the host.

#include "common/cuda_uncertainty.cuh"


#include "common/bilinear.h"
#include "sample_uncertain_points/problem.h"

namespace paper_layers {
namespace {

template <typename T, typename Index_>
struct SampledMargin {
  using A = Accumulator<T>;
  using Index = Index_;

  LogitMaps maps;
  FirstClass first_class;
  const T* logits;
  const float* points;
  int64_t candidates;

  C10_DEVICE A operator()(int64_t image, int64_t number) const {
    const T* from = logits + image * maps.image_stride + first_class(image) * maps.class_stride;
    const PointTaps taps(maps, points + 2 * (image * candidates + number));
    const int64_t classes = first_class.labels != nullptr ? 1 : maps.classes;
    Margin<A> margin;
#pragma unroll 2
    for (int64_t c = 0; c < classes; ++c) {
      const T* map = from + c * maps.class_stride;
      A sum = 0;
      for (int i = 0; i < 4; ++i) sum += taps.inside[i] ? A(taps.weights[i]) * A(map[taps.offsets[i]]) : A(0);
      margin.add(sum);
    }
    return margin.of(classes);
  }
};

Tensor sample_uncertain_points(const Tensor& logits, const MaybeTensor& labels, const Tensor& any_points,
                               int64_t count) {
  check_sample_uncertain_points(logits, labels, any_points, count);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Tensor points = to_contiguous(any_points);
  const LogitMaps maps = sampled_maps(logits);
  const ImageLabels of_image(labels);
  const FirstClass first_class{of_image.data(), logits.size(1)};
  const int64_t candidates = points.size(1);
  Tensor result;
  dispatch(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    result = with_index(maps.images * candidates, [&](auto index) {
      return smallest_margins<Accumulator<T>>(
          logits, maps.images, candidates, count,
          SampledMargin<T, decltype(index)>{maps, first_class, logits.const_data_ptr<T>(),
                                            points.const_data_ptr<float>(), candidates});
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CUDA, m) {
  m.impl("sample_uncertain_points", TORCH_BOX(&sample_uncertain_points));
}

}  // namespace paper_layers
