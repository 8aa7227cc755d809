// The CUDA kernels of point sampling.
//
// Forward: a thread a channel of a point. Backward of the maps: the taps are sorted by the pixel that they take, and
// each pixel gathers from its own, in order: no atomics, so results do not vary from run to run. Backward of the
// points: a thread a point.

#include "common/reverse_table.cuh"

#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include "point_sample/cuda_kernel.cuh"
#include "point_sample/problem.h"

namespace paper_layers {
namespace {

using torch::headeronly::MemoryFormat;
using MaybeTensor = std::optional<Tensor>;
using MaybeNumbers = std::optional<std::vector<double>>;

// The arguments as the kernels take them.
struct Arguments {
  PointSampleProblem problem;
  int32_t device;
  torch::stable::accelerator::DeviceGuard guard;
  Tensor points;
  MaybeTensor image;

  Arguments(const Tensor& points, const MaybeTensor& image, const std::vector<Tensor>& maps,
            const MaybeNumbers& spatial_scale, const std::string& mode, const std::string& padding)
      : problem(point_sample_problem(points, image, maps, spatial_scale, mode, padding)),
        device(points.get_device_index()),
        guard(device),
        points(torch::stable::contiguous(points)) {
    if (image) this->image = torch::stable::contiguous(*image);
  }

  int64_t count() const { return problem.rows * problem.points; }
  MemoryFormat format() const { return problem.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous; }
  Strides map_strides(const Level& level) const { return {level.channels, level.pixels(), problem.channels_last}; }
  Strides output_strides() const { return {problem.channels, problem.points, problem.channels_last}; }

  // Calls function(element of the maps, the points as a level sees them).
  template <typename Function>
  void dispatch(const Level& level, ScalarType dtype, Function function) const {
    with_dtype(dtype, [&](auto element) {
      Coordinates(points).visit([&](const auto* data) {
        using C = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
        function(element, LevelPoints<C>{level.height, level.width, static_cast<C>(level.scale_x),
                                         static_cast<C>(level.scale_y), problem.how, problem.images, problem.points,
                                         data, image ? image->const_data_ptr<int64_t>() : nullptr});
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
    const Tensor map = torch::stable::contiguous(maps[l], arguments.format());
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

// As the output is.
Tensor in_output_layout(const Tensor& grad, const PointSampleProblem& problem) {
  return torch::stable::contiguous(problem.channels_last ? torch::stable::transpose(grad, 1, 2) : grad);
}

std::vector<Tensor> point_sample_backward_maps(const Tensor& any_grad, const Tensor& points, const MaybeTensor& image,
                                               const std::vector<Tensor>& maps, const MaybeNumbers& spatial_scale,
                                               std::string mode, std::string padding) {
  const Arguments arguments(points, image, maps, spatial_scale, mode, padding);
  const PointSampleProblem& problem = arguments.problem;
  check_grad(any_grad, problem, maps[0]);
  const Tensor grad = in_output_layout(any_grad, problem);
  std::vector<Tensor> grad_maps;
  for (size_t l = 0; l < maps.size(); ++l) {
    const Level& level = problem.levels[l];
    const Tensor grad_map = torch::stable::empty(maps[l].sizes(), maps[l].scalar_type(), std::nullopt,
                                                 maps[l].device(), std::nullopt, arguments.format());
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
  check_grad(any_grad, problem, maps[0]);
  const Tensor grad = in_output_layout(any_grad, problem);
  Tensor grad_points = torch::stable::new_empty(arguments.points, points.sizes());
  torch::stable::zero_(grad_points);
  for (size_t l = 0; l < maps.size(); ++l) {
    const Level& level = problem.levels[l];
    const Tensor map = torch::stable::contiguous(maps[l], arguments.format());
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
