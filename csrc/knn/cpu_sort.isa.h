// Sorts of scores with their indices, the largest first, compiled once for each instruction set.

// Up to so many are sorted by counting.
constexpr int64_t kFew = 64;

// The largest scores first. The number of larger scores is a score's place; returns false if some are equal.
template <typename T>
bool sort_few(T* scores, int32_t* indices, int64_t count) {
  using V = Vec<T>;
  if (count > kFew) return false;
  T sorted[kFew];
  int32_t sorted_indices[kFew];
  std::fill_n(scores + count, V::size, -std::numeric_limits<T>::infinity());
  int64_t sum = 0;
  for (int64_t i = 0; i < count; i += V::size) {
    const V block = load(scores + i);
    typename V::BitLanes larger = {};
    for (int64_t j = 0; j < count; ++j) larger -= V(scores[j]).lanes > block.lanes;
    for (int64_t lane = 0; lane < std::min(V::size, count - i); ++lane) {
      sorted[larger[lane]] = scores[i + lane];
      sorted_indices[larger[lane]] = indices[i + lane];
      sum += larger[lane];
    }
  }
  if (sum != count * (count - 1) / 2) return false;
  std::copy_n(sorted, count, scores);
  std::copy_n(sorted_indices, count, indices);
  return true;
}

// The largest scores first, where there is room for a vector more. Up to 2^16 are sorted as integers below 2^16, by one
// byte after the other; the few that become equal, by insertion.
template <typename T>
class RoundedSort {
  struct Entry {
    T score;
    int32_t index;
    friend bool operator<(const Entry& a, const Entry& b) { return a.score > b.score; }
  };

 public:
  explicit RoundedSort(int64_t capacity) : keys_(capacity), halfway_(capacity), sorted_(capacity) {}

  void operator()(T* scores, int32_t* indices, int64_t count) {
    if (count > 1 << 16 || !(sort_rounded(scores, indices, count) && insert(count))) {
      for (int64_t i = 0; i < count; ++i) sorted_[i] = {scores[i], indices[i]};
      std::sort(sorted_.begin(), sorted_.begin() + count);
    }
    for (int64_t i = 0; i < count; ++i) {
      scores[i] = sorted_[i].score;
      indices[i] = sorted_[i].index;
    }
  }

 private:
  // False where a score is too large for differences.
  bool sort_rounded(T* scores, const int32_t* indices, int64_t count) {
    using V = Vec<T>;
    std::fill_n(scores + count, V::size, scores[0]);
    V largest(scores[0]), least = largest;
    for (int64_t i = 0; i < count; i += V::size) {
      largest = max_or_second(load(scores + i), largest);
      least = min_or_second(load(scores + i), least);
    }
    const T top = largest_of(largest), bottom = -largest_of(V(-least.lanes));
    const T rate = top > bottom ? T(65535) / (top - bottom) : T(0);
    if (!std::isfinite(top - bottom) || !std::isfinite(rate)) return false;
    for (int64_t i = 0; i < count; ++i) {
      // A number of 16 bits, and the place.
      const int32_t rounded = std::min(static_cast<int32_t>((top - scores[i]) * rate), 65535);
      keys_[i] = static_cast<uint32_t>(rounded) << 16 | static_cast<uint32_t>(i);
    }
    uint32_t low[256] = {}, high[256] = {};
    for (int64_t i = 0; i < count; ++i) {
      ++low[keys_[i] >> 16 & 255];
      ++high[keys_[i] >> 24];
    }
    uint32_t before_low = 0, before_high = 0;
    for (int64_t d = 0; d < 256; ++d) {
      before_low += std::exchange(low[d], before_low);
      before_high += std::exchange(high[d], before_high);
    }
    for (int64_t i = 0; i < count; ++i) halfway_[low[keys_[i] >> 16 & 255]++] = keys_[i];
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t place = halfway_[i] & 65535;
      sorted_[high[halfway_[i] >> 24]++] = {scores[place], indices[place]};
    }
    return true;
  }

  // False where too many would have to move.
  bool insert(int64_t count) {
    int64_t moves = 0;
    for (int64_t i = 1; i < count && moves <= 4 * count; ++i) {
      if (!(sorted_[i] < sorted_[i - 1])) continue;
      const Entry entry = sorted_[i];
      int64_t to = i;
      for (; to > 0 && entry < sorted_[to - 1]; --to) sorted_[to] = sorted_[to - 1];
      sorted_[to] = entry;
      moves += i - to;
    }
    return moves <= 4 * count;
  }

  std::vector<uint32_t> keys_, halfway_;
  std::vector<Entry> sorted_;
};
