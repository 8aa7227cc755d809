// A range of rows, columns or points.
#pragma once

#include <algorithm>
#include <cstdint>

namespace paper_layers {

struct Range {
  int64_t begin, end;
  int64_t size() const { return std::max<int64_t>(0, end - begin); }
};

inline Range intersection(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

}  // namespace paper_layers
