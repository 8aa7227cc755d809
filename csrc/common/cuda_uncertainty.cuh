// Margins of logits on the GPU, and the points of the smallest ones.
#pragma once

#include "common/reverse_table.cuh"

#include <array>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <torch/csrc/stable/library.h>

namespace paper_layers {
namespace {

// Best minus second best of the classes that come one after the other; of a single class its magnitude. NaN where one
// of them is.
template <typename A>
class Margin {
 public:
  C10_DEVICE void add(A x) {
    second_ = larger(second_, x < best_ ? x : best_);
    best_ = larger(best_, x);
    poison_ = poison_ || x != x;
  }
  C10_DEVICE A of(int64_t classes) const {
    if (poison_) return static_cast<A>(NAN);
    return classes == 1 ? larger(best_, -best_) : best_ - second_;
  }

 private:
  C10_DEVICE static A larger(A a, A b) { return a > b ? a : b; }

  A best_ = -static_cast<A>(INFINITY), second_ = -static_cast<A>(INFINITY);
  bool poison_ = false;
};

// The class of an image, or 0. As in torch's own indexing, one out of range stops the device's work with an assertion:
// the host could not know of it without waiting.
struct FirstClass {
  const int64_t* labels;
  int64_t classes;

  C10_DEVICE int64_t operator()(int64_t image) const {
    if (labels == nullptr) return 0;
    CUDA_KERNEL_ASSERT(0 <= labels[image] && labels[image] < classes && "labels: out of range");
    return labels[image];
  }
};

// A margin above its point, ordered as first the one, then the other are; margins are not negative, and NaN is before
// them.
template <typename MarginOf>
struct WriteMarginKeys {
  MarginOf margin_of;
  Divider<typename MarginOf::Index> by_points;
  int64_t points;
  int64_t* keys;

  C10_DEVICE void operator()(typename MarginOf::Index i) const {
    const int64_t image = by_points(i), point = i - image * points;
    const float margin = margin_of(image, point);
    const int64_t order = margin != margin ? 0 : int64_t(__float_as_int(fabsf(margin))) + 1;
    keys[i] = order << 32 | point;
  }
};

struct PointOfKey {
  int64_t* keys;

  C10_DEVICE void operator()(int64_t i) const { keys[i] &= 0xffffffff; }
};

// In float64 only the margin fits into a key.
template <typename MarginOf>
struct WriteMargins {
  MarginOf margin_of;
  Divider<typename MarginOf::Index> by_points;
  int64_t points;
  double* margins;

  C10_DEVICE void operator()(typename MarginOf::Index i) const {
    const int64_t image = by_points(i);
    const double margin = margin_of(image, i - image * points);
    margins[i] = margin != margin ? -1.0 : fabs(margin);
  }
};

// The smallest of each row, in order.
inline Tensor smallest(const Tensor& rows, int64_t wanted) {
  std::array<StableIValue, 5> stack{torch::stable::detail::from(rows), torch::stable::detail::from(wanted),
                                    torch::stable::detail::from(int64_t(1)), torch::stable::detail::from(false),
                                    torch::stable::detail::from(true)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::topk", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor indices = torch::stable::detail::to<Tensor>(stack[1]);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The indices of the smallest margins of each image in order, among equal ones the first. margin_of(image, point) is a
// functor on the device. Every key is different, so that the choice among equals is not left to chance.
template <typename A, typename MarginOf>
Tensor smallest_margins(const Tensor& like, int64_t images, int64_t points, int64_t wanted, const MarginOf& margin_of) {
  STD_TORCH_CHECK(points <= std::numeric_limits<int32_t>::max(), "expected fewer than 2^31 points in an image, got ",
                  points);
  const int32_t device = like.get_device_index();
  if (images == 0 || wanted == 0) return new_empty(like, {images, wanted}, ScalarType::Long);
  const Divider<typename MarginOf::Index> by_points(points);
  if constexpr (std::is_same_v<A, float>) {
    const Tensor keys = new_empty(like, {images, points}, ScalarType::Long);
    for_each_index<typename MarginOf::Index>(
        images * points, device,
        WriteMarginKeys<MarginOf>{margin_of, by_points, points, keys.mutable_data_ptr<int64_t>()});
    const Tensor index = to_contiguous(smallest(keys, wanted));
    for_each_index<int64_t>(images * wanted, device, PointOfKey{index.mutable_data_ptr<int64_t>()});
    return index;
  } else {
    const Tensor margins = new_empty(like, {images, points}, ScalarType::Double);
    for_each_index<typename MarginOf::Index>(
        images * points, device,
        WriteMargins<MarginOf>{margin_of, by_points, points, margins.mutable_data_ptr<double>()});
    Tensor order = sorted(margins, 1).order;
    return to_contiguous(torch::stable::narrow(order, 1, 0, wanted));
  }
}

// Calls function(index) with an integer that counts so many points.
template <typename Function>
Tensor with_index(int64_t count, Function&& function) {
  return count <= std::numeric_limits<int32_t>::max() ? function(int32_t()) : function(int64_t());
}

}  // namespace
}  // namespace paper_layers
