#pragma once

#include <cstdint>

namespace paper_layers {

// Element (i, j) is data[i * row + j * column].
template <typename A>
struct MatrixView {
  const A* data;
  int64_t row, column;
};

}  // namespace paper_layers
