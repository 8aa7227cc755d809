// The CUDA kernels of point sampling.
//
// Forward: a thread a channel of a point. Backward of the maps: the taps are sorted by the pixel that they take, and
// each pixel gathers from its own, in order: no atomics, so results do not vary from run to run. Backward of the
// points: a thread a point.

#include "common/reverse_table.cuh"

#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "point_sample/cuda_kernel.cuh"
#include "point_sample/problem.h"

namespace paper_layers {
namespace {

struct Arguments : PointSampleArguments {
  int32_t device = points.get_device_index();
  torch::stable::accelerator::DeviceGuard guard{device};

  using PointSampleArguments::PointSampleArguments;

  int64_t count() const { return problem.rows * problem.points; }
  Strides map_strides(const Level& level) const { return {level.channels, level.pixels(), problem.channels_last}; }
  Strides output_strides() const { return {problem.channels, problem.points, problem.channels_last}; }

  // Calls function(element of the maps, the points as a level sees them).
  template <typename Function>
  void dispatch(const Level& level, ScalarType dtype, Function function) const {
    paper_layers::dispatch(dtype, [&](auto element) {
      Coordinates(points).visit([&](const auto* data) {
        using C = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
        function(element, LevelPoints<C>{level.height, level.width, static_cast<C>(level.scale_x),
                                         static_cast<C>(level.scale_y), problem.how, problem.images, problem.points,
                                         data, image_data()});
      });
    });
  }
};

Tensor point_sample(const Tensor& points, const MaybeTensor& image, const std::vector<Tensor>& maps,
                    const MaybeNumbers& spatial_scale, std::string mode, std::string padding) {
  const Arguments arguments(points, image, maps, spatial_scale, mode, padding);
  const PointSampleProblem& problem = arguments.problem;
  const Tensor output = new_output(maps[0], problem);
  for (size_t l = 0; l < maps.size(); ++l) {
    const Level& level = problem.levels[l];
    const Tensor map = to_contiguous(maps[l], problem.format());
    arguments.dispatch(level, map.scalar_type(), [&](auto element, auto seen) {
      using T = decltype(element);
      using C = std::remove_const_t<std::remove_pointer_t<decltype(seen.coordinates)>>;
      const Sample<T, C> body{seen,
                              {arguments.count(), level.channels, problem.channels_last},
                              level.first_channel,
                              arguments.map_strides(level),
                              arguments.output_strides(),
                              map.const_data_ptr<T>(),
                              output.mutable_data_ptr<T>()};
      for_each_index<int64_t>(arguments.count() * level.channels, arguments.device, body);
    });
  }
  return output;
}

std::vector<Tensor> point_sample_backward_maps(const Tensor& any_grad, const Tensor& points, const MaybeTensor& image,
                                               const std::vector<Tensor>& maps, const MaybeNumbers& spatial_scale,
                                               std::string mode, std::string padding) {
  const Arguments arguments(points, image, maps, spatial_scale, mode, padding);
  const PointSampleProblem& problem = arguments.problem;
  const Tensor grad = arguments.output_grad(any_grad, maps[0]);
  std::vector<Tensor> grad_maps;
  for (size_t l = 0; l < maps.size(); ++l) {
    const Level& level = problem.levels[l];
    const Tensor grad_map = new_grad_map(maps[l], problem);
    grad_maps.push_back(grad_map);
    if (grad_map.numel() == 0) continue;
    const int64_t pixels = problem.images * level.pixels();
    arguments.dispatch(level, grad.scalar_type(), [&](auto element, auto seen) {
      using T = decltype(element);
      using C = std::remove_const_t<std::remove_pointer_t<decltype(seen.coordinates)>>;
      const ReverseTable reverse = reverse_table(grad, 4 * arguments.count(), pixels, PixelOfTap<C>{seen});
      const GatherPixel<T, C> body{seen,
                                   {pixels, level.channels, problem.channels_last},
                                   level.first_channel,
                                   arguments.map_strides(level),
                                   arguments.output_strides(),
                                   reverse.edge_data(),
                                   reverse.start_data(),
                                   grad.const_data_ptr<T>(),
                                   grad_map.mutable_data_ptr<T>()};
      for_each_index<int64_t>(pixels * level.channels, arguments.device, body);
    });
  }
  return grad_maps;
}

Tensor point_sample_backward_points(const Tensor& any_grad, const Tensor& points, const MaybeTensor& image,
                                    const std::vector<Tensor>& maps, const MaybeNumbers& spatial_scale,
                                    std::string mode, std::string padding) {
  const Arguments arguments(points, image, maps, spatial_scale, mode, padding);
  const PointSampleProblem& problem = arguments.problem;
  const Tensor grad = arguments.output_grad(any_grad, maps[0]);
  Tensor grad_points = empty_like(arguments.points);
  zero_(grad_points);
  for (size_t l = 0; l < maps.size(); ++l) {
    const Level& level = problem.levels[l];
    const Tensor map = to_contiguous(maps[l], problem.format());
    arguments.dispatch(level, grad.scalar_type(), [&](auto element, auto seen) {
      using T = decltype(element);
      using C = std::remove_const_t<std::remove_pointer_t<decltype(seen.coordinates)>>;
      const AddPoint<T, C> body{seen,
                                level.channels,
                                level.first_channel,
                                arguments.map_strides(level),
                                arguments.output_strides(),
                                map.const_data_ptr<T>(),
                                grad.const_data_ptr<T>(),
                                grad_points.mutable_data_ptr<C>()};
      for_each_index<int64_t>(arguments.count(), arguments.device, body);
    });
  }
  return grad_points;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CUDA, m) {
  m.impl("point_sample", TORCH_BOX(&point_sample));
  m.impl("point_sample_backward_maps", TORCH_BOX(&point_sample_backward_maps));
  m.impl("point_sample_backward_points", TORCH_BOX(&point_sample_backward_points));
}

}  // namespace paper_layers
