// Maps of logits for the uncertainty of their pixels, for the CPU and the CUDA kernels.
//
// They compute margins, the uncertainty with its sign changed: best minus second best logit, or the magnitude of a
// single class's. The smallest margins are the most uncertain.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/headeronly/macros/Macros.h>

#include "common/tensors.h"

namespace paper_layers {

struct LogitMaps {
  int64_t images, classes, height, width;
  int64_t image_stride, class_stride, row_stride, column_stride;

  C10_HOST_DEVICE int64_t pixels() const { return height * width; }

  // Tells if all pixels are `pixel_stride` apart, also from one row to the next.
  bool flat() const { return height <= 1 || width <= 1 || row_stride == width * column_stride; }
  C10_HOST_DEVICE int64_t pixel_stride() const { return width <= 1 ? row_stride : column_stride; }
};

inline LogitMaps logit_maps(const Tensor& logits) {
  checked_product({logits.size(2), logits.size(3)});
  return {logits.size(0),   logits.size(1),   logits.size(2),   logits.size(3),
          logits.stride(0), logits.stride(1), logits.stride(2), logits.stride(3)};
}

inline void check_logits(const Tensor& logits, const MaybeTensor& labels) {
  check_floating("logits", logits);
  STD_TORCH_CHECK(logits.dim() == 4 && logits.size(1) > 0,
                  "logits: expected shape (N, C, H, W) with at least one class, got ", to_string(logits.sizes()));
  if (!labels.has_value()) return;
  STD_TORCH_CHECK(labels->scalar_type() == ScalarType::Long && labels->dim() == 1 && labels->size(0) == logits.size(0),
                  "labels: expected int64 of shape (", logits.size(0), "), got ", labels->scalar_type(), " of shape ",
                  to_string(labels->sizes()));
  check_same_device("labels", *labels, "logits", logits);
}

// The class of each image, contiguous, or null where all classes count.
class ImageLabels {
 public:
  explicit ImageLabels(const MaybeTensor& labels) : labels_(labels) { make_contiguous(labels_); }
  const int64_t* data() const { return labels_.has_value() ? labels_->const_data_ptr<int64_t>() : nullptr; }

  // On the CPU: labels are data, read before what they point to.
  void check(const LogitMaps& maps) const {
    for (int64_t i = 0; labels_.has_value() && i < maps.images; ++i) {
      STD_TORCH_CHECK(0 <= data()[i] && data()[i] < maps.classes, "labels: expected classes from 0 to ",
                      maps.classes - 1, ", got ", data()[i]);
    }
  }

 private:
  MaybeTensor labels_;
};

}  // namespace paper_layers
