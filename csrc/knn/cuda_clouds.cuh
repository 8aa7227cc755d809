// Clouds on the device: the host does not know where ragged ones start, and need not wait to know.
#pragma once

#include <cstdint>

#include <torch/headeronly/macros/Macros.h>

namespace paper_layers {
namespace {

// Rows that lie together.
struct Span {
  int64_t begin, count;
};

// The rows of clouds that follow each other.
struct CloudRows {
  const int64_t* starts;  // clouds + 1 numbers; null where every cloud has `each` rows
  int64_t clouds, each, rows;

  // Starts are data: whatever they hold, this is within the rows.
  C10_DEVICE int64_t start(int64_t cloud) const {
    if (starts == nullptr) return cloud * each;
    const int64_t value = starts[cloud];
    return value < 0 ? 0 : value > rows ? rows : value;
  }
  C10_DEVICE Span span(int64_t cloud) const {
    const int64_t begin = start(cloud), end = start(cloud + 1);
    return {begin, end > begin ? end - begin : 0};
  }
  C10_DEVICE int64_t cloud_of_row(int64_t row) const {
    if (starts == nullptr) return row / each;
    return last_cloud([&](int64_t cloud) { return start(cloud) <= row; });
  }

  // Rows in blocks of `width`, so that no block has rows of two clouds and the number of blocks is known without the
  // starts: a cloud of n rows that starts at row s has blocks from s / width + cloud, enough for it.
  C10_HOST_DEVICE int64_t blocks(int64_t width) const { return rows / width + clouds; }
  C10_DEVICE int64_t first_block(int64_t cloud, int64_t width) const { return start(cloud) / width + cloud; }
  C10_DEVICE int64_t cloud_of_block(int64_t block, int64_t width) const {
    return last_cloud([&](int64_t cloud) { return first_block(cloud, width) <= block; });
  }

 private:
  // The last cloud that holds, if the first ones do.
  template <typename Holds>
  C10_DEVICE int64_t last_cloud(Holds holds) const {
    int64_t low = 0;
    for (int64_t high = clouds; high - low > 1;) {
      const int64_t middle = low + (high - low) / 2;
      if (holds(middle)) low = middle;
      else high = middle;
    }
    return low;
  }
};

// A block of rows of a cloud.
struct Block {
  int64_t cloud;
  Span rows;      // none where the block is a spare one
  int64_t first;  // in the cloud
};

C10_DEVICE inline Block block_of(const CloudRows& rows, int64_t block, int64_t width) {
  const int64_t cloud = rows.cloud_of_block(block, width);
  const Span span = rows.span(cloud);
  const int64_t first = (block - rows.first_block(cloud, width)) * width;
  if (first < 0 || first >= span.count) return {cloud, {span.begin, 0}, 0};
  const int64_t left = span.count - first;
  return {cloud, {span.begin + first, left < width ? left : width}, first};
}

}  // namespace
}  // namespace paper_layers
