// Point sampling on the CPU.
#include <torch/csrc/stable/library.h>

#include "common/range.h"
#include "point_sample/problem.h"

#define PAPER_LAYERS_KERNEL "point_sample/cpu_kernel.isa.h"
#include "common/for_each_isa.h"

namespace paper_layers {
namespace {

// Image numbers are data: they are checked before a map is read.
struct Arguments : PointSampleArguments {
  std::vector<Tensor> maps;

  Arguments(const Tensor& points, const MaybeTensor& image, const std::vector<Tensor>& maps,
            const MaybeNumbers& spatial_scale, const std::string& mode, const std::string& padding,
            bool reads_maps = true)
      : PointSampleArguments(points, image, maps, spatial_scale, mode, padding), maps(maps) {
    for (Tensor& map : this->maps) {
      if (reads_maps) map = to_contiguous(map, problem.format());
    }
    for (int64_t row = 0; image && row < problem.rows; ++row) {
      STD_TORCH_CHECK(0 <= image_data()[row] && image_data()[row] < problem.images, "boxes: expected numbers of ",
                      problem.images, " images, got ", image_data()[row]);
    }
  }

  template <typename T>
  std::vector<const T*> map_data() const {
    std::vector<const T*> data;
    for (const Tensor& map : maps) data.push_back(map.const_data_ptr<T>());
    return data;
  }
};

Tensor point_sample(const Tensor& points, const MaybeTensor& image, const std::vector<Tensor>& maps,
                    const MaybeNumbers& spatial_scale, std::string mode, std::string padding) {
  const Arguments arguments(points, image, maps, spatial_scale, mode, padding);
  Tensor output = new_output(maps[0], arguments.problem);
  if (output.numel() == 0) return output;
  dispatch(output.scalar_type(), [&](auto element) {
    using T = decltype(element);
    PAPER_LAYERS_DISPATCH(forward(arguments.problem, Coordinates(arguments.points), arguments.image_data(),
                                  arguments.map_data<T>(), output.mutable_data_ptr<T>()));
  });
  return output;
}

std::vector<Tensor> point_sample_backward_maps(const Tensor& any_grad, const Tensor& points, const MaybeTensor& image,
                                               const std::vector<Tensor>& maps, const MaybeNumbers& spatial_scale,
                                               std::string mode, std::string padding) {
  const Arguments arguments(points, image, maps, spatial_scale, mode, padding, false);
  const Tensor grad = arguments.output_grad(any_grad, maps[0]);
  std::vector<Tensor> grad_maps;
  for (const Tensor& map : maps) grad_maps.push_back(new_grad_map(map, arguments.problem));
  if (grad.numel() == 0) {
    for (Tensor& map : grad_maps) zero_(map);
    return grad_maps;
  }
  dispatch(grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    std::vector<T*> data;
    for (Tensor& map : grad_maps) data.push_back(map.mutable_data_ptr<T>());
    PAPER_LAYERS_DISPATCH(backward_maps(arguments.problem, grad.const_data_ptr<T>(), Coordinates(arguments.points),
                                        arguments.image_data(), data));
  });
  return grad_maps;
}

Tensor point_sample_backward_points(const Tensor& any_grad, const Tensor& points, const MaybeTensor& image,
                                    const std::vector<Tensor>& maps, const MaybeNumbers& spatial_scale,
                                    std::string mode, std::string padding) {
  const Arguments arguments(points, image, maps, spatial_scale, mode, padding);
  const Tensor grad = arguments.output_grad(any_grad, maps[0]);
  Tensor grad_points = empty_like(arguments.points);
  if (grad.numel() == 0) return zero_(grad_points);
  dispatch(grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Coordinates coordinates(arguments.points);
    coordinates.visit([&](auto* data) {
      using C = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
      PAPER_LAYERS_DISPATCH(backward_points(arguments.problem, grad.const_data_ptr<T>(), data, coordinates,
                                            arguments.image_data(), arguments.map_data<T>(),
                                            grad_points.mutable_data_ptr<C>()));
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
