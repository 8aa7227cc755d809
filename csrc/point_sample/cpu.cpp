// Point sampling on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include "common/accumulator.h"
#include "common/range.h"
#include "point_sample/problem.h"

#define PAPER_LAYERS_KERNEL "point_sample/cpu_kernel.isa.h"
#include "common/for_each_isa.h"

namespace paper_layers {
namespace {

using torch::headeronly::MemoryFormat;
using MaybeTensor = std::optional<Tensor>;
using MaybeNumbers = std::optional<std::vector<double>>;

// The arguments as the kernels take them; what points to them lives as long.
struct Arguments {
  PointSampleProblem problem;
  Tensor points;
  MaybeTensor image;
  std::vector<Tensor> maps;

  Arguments(const Tensor& points, const MaybeTensor& image, const std::vector<Tensor>& maps,
            const MaybeNumbers& spatial_scale, const std::string& mode, const std::string& padding,
            bool reads_maps = true)
      : problem(point_sample_problem(points, image, maps, spatial_scale, mode, padding)),
        points(torch::stable::contiguous(points)) {
    for (const Tensor& map : maps) this->maps.push_back(reads_maps ? torch::stable::contiguous(map, format()) : map);
    if (!image) return;
    this->image = torch::stable::contiguous(*image);
    for (int64_t row = 0; row < problem.rows; ++row) {
      STD_TORCH_CHECK(0 <= image_data()[row] && image_data()[row] < problem.images, "boxes: expected numbers of ",
                      problem.images, " images, got ", image_data()[row]);
    }
  }

  MemoryFormat format() const { return problem.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous; }
  const int64_t* image_data() const { return image ? image->const_data_ptr<int64_t>() : nullptr; }
  template <typename T>
  std::vector<const T*> map_data() const {
    std::vector<const T*> data;
    for (const Tensor& map : maps) data.push_back(map.const_data_ptr<T>());
    return data;
  }

  // Calls function with an element of the maps.
  template <typename Function>
  void dispatch(Function function) const {
    THO_DISPATCH_V2(maps[0].scalar_type(), "point_sample", AT_WRAP([&] { function(scalar_t{}); }), ScalarType::Float,
                    ScalarType::Double, ScalarType::BFloat16, ScalarType::Half);
  }
};

Tensor point_sample(const Tensor& points, const MaybeTensor& image, const std::vector<Tensor>& maps,
                    const MaybeNumbers& spatial_scale, std::string mode, std::string padding) {
  const Arguments arguments(points, image, maps, spatial_scale, mode, padding);
  const PointSampleProblem& problem = arguments.problem;
  Tensor output = new_output(maps[0], problem);
  if (output.numel() > 0) {
    arguments.dispatch([&](auto element) {
      using T = decltype(element);
      PAPER_LAYERS_DISPATCH(forward(problem, Coordinates(arguments.points), arguments.image_data(), arguments.map_data<T>(),
                                    output.mutable_data_ptr<T>()));
    });
  }
  return output;
}

// As the output is.
Tensor in_output_layout(const Tensor& grad, const PointSampleProblem& problem) {
  return torch::stable::contiguous(problem.channels_last ? torch::stable::transpose(grad, 1, 2) : grad);
}

std::vector<Tensor> point_sample_backward_maps(const Tensor& grad, const Tensor& points, const MaybeTensor& image,
                                               const std::vector<Tensor>& maps, const MaybeNumbers& spatial_scale,
                                               std::string mode, std::string padding) {
  const Arguments arguments(points, image, maps, spatial_scale, mode, padding, false);
  const PointSampleProblem& problem = arguments.problem;
  check_grad(grad, problem, maps[0]);
  const Tensor g = in_output_layout(grad, problem);
  std::vector<Tensor> grad_maps;
  for (const Tensor& map : maps) {
    grad_maps.push_back(torch::stable::empty(map.sizes(), map.scalar_type(), std::nullopt, map.device(), std::nullopt,
                                             arguments.format()));
  }
  if (g.numel() == 0) {
    for (Tensor& map : grad_maps) torch::stable::zero_(map);
    return grad_maps;
  }
  arguments.dispatch([&](auto element) {
    using T = decltype(element);
    std::vector<T*> data;
    for (Tensor& map : grad_maps) data.push_back(map.mutable_data_ptr<T>());
    PAPER_LAYERS_DISPATCH(backward_maps(problem, g.const_data_ptr<T>(), Coordinates(arguments.points),
                                        arguments.image_data(), data));
  });
  return grad_maps;
}

Tensor point_sample_backward_points(const Tensor& grad, const Tensor& points, const MaybeTensor& image,
                                    const std::vector<Tensor>& maps, const MaybeNumbers& spatial_scale,
                                    std::string mode, std::string padding) {
  const Arguments arguments(points, image, maps, spatial_scale, mode, padding);
  const PointSampleProblem& problem = arguments.problem;
  check_grad(grad, problem, maps[0]);
  const Tensor g = in_output_layout(grad, problem);
  Tensor grad_points = torch::stable::new_empty(arguments.points, points.sizes());
  if (g.numel() == 0) return torch::stable::zero_(grad_points);
  arguments.dispatch([&](auto element) {
    using T = decltype(element);
    const Coordinates coordinates(arguments.points);
    coordinates.visit([&](auto* data) {
      using C = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
      PAPER_LAYERS_DISPATCH(backward_points(problem, g.const_data_ptr<T>(), data, coordinates, arguments.image_data(),
                                            arguments.map_data<T>(), grad_points.mutable_data_ptr<C>()));
    });
  });
  return grad_points;
}

}  // namespace
}  // namespace paper_layers

STABLE_TORCH_LIBRARY_IMPL(paper_layers, CPU, m) {
  m.impl("point_sample", TORCH_BOX(&paper_layers::point_sample));
  m.impl("point_sample_backward_maps", TORCH_BOX(&paper_layers::point_sample_backward_maps));
  m.impl("point_sample_backward_points", TORCH_BOX(&paper_layers::point_sample_backward_points));
}
