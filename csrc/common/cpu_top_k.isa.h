// The points of the smallest margins, compiled once for each instruction set.

// A margin above a point's index in one signed integer, ordered as first the one, then the other are. Margins are not
// negative; NaN, which is before them, is written as -1.
template <typename A, typename Bits, typename Packed_>
struct Packing {
  using Margin = A;
  using Packed = Packed_;
  static constexpr int half = 4 * sizeof(Packed);

  static Packed pack(A margin, int64_t index) {
    margin = margin != margin ? A(-1) : margin + A(0);  // -0 becomes 0
    Bits bits;
    std::memcpy(&bits, &margin, sizeof(bits));
    return bits * (Packed(1) << half) + index;
  }
  static A margin(Packed packed) {
    const Bits bits = static_cast<Bits>(packed >> half);
    A margin;
    std::memcpy(&margin, &bits, sizeof(bits));
    return margin;
  }
  static int64_t index(Packed packed) { return static_cast<int64_t>(packed & ((Packed(1) << half) - 1)); }
};

// Moves the k smallest of n different values to the front, the largest of them last, as std::nth_element does, but
// without unpredictable branches.
template <typename Packed>
void move_smallest_forward(Packed* values, int64_t n, int64_t k) {
  for (int round = 0; round < 32 && n > 32; ++round) {
    const Packed a = values[0], b = values[n / 2], c = values[n - 1];
    const Packed pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    int64_t less = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Packed x = values[i];
      values[i] = values[less];
      values[less] = x;
      less += x < pivot;
    }
    if (k <= less) {
      n = less;
    } else {
      values += less;
      n -= less;
      k -= less;
    }
  }
  std::nth_element(values, values + (k - 1), values + n);
}

// The `wanted` smallest of margins that come block by block, by ascending index: among equal ones the first.
template <typename P>
class Smallest {
  using A = typename P::Margin;
  using Packed = typename P::Packed;
  using V = Vec<A>;

 public:
  Smallest(int64_t wanted, int64_t points)
      : wanted_(wanted), room_(std::min(points, std::max<int64_t>(3 * wanted, 1024))), kept_(room_ + V::size) {}

  void add(const A* margins, int64_t count, int64_t first) {
    // Most of the first block need not be looked at twice, if a sample tells what is small.
    if (count_ == 0 && count >= 4 * wanted_ && count >= 32 * kSampled) {
      bound_ = guess(margins, count);
      filter(margins, count, first);
      if (count_ >= wanted_) return;
      count_ = 0;
      bound_ = kNone;
    }
    filter(margins, count, first);
  }

  // In order.
  std::vector<Packed> take() {
    keep_wanted();
    kept_.resize(count_);
    std::sort(kept_.begin(), kept_.end());
    return std::move(kept_);
  }

 private:
  static constexpr int64_t kSampled = 64;  // points for one of the sample
  static constexpr A kNone = std::numeric_limits<A>::quiet_NaN();

  void filter(const A* margins, int64_t count, int64_t first) {
    int64_t i = 0;
    for (; i + V::size <= count; i += V::size) {
      // Neither a bound that is NaN nor a margin that is NaN excludes.
      uint32_t below = ~lanes_not_below(load(margins + i), V(bound_)) & ((1u << V::size) - 1);
      if (below == 0) continue;
      for (; below != 0; below &= below - 1) {
        const int64_t at = i + __builtin_ctz(below);
        kept_[count_++] = P::pack(margins[at], first + at);
      }
      if (count_ >= room_) keep_wanted();
    }
    for (; i < count; ++i) {
      if (!(margins[i] >= bound_)) kept_[count_++] = P::pack(margins[i], first + i);
    }
  }

  // All that follows has higher indices: it must be less than the last one that is kept.
  void keep_wanted() {
    if (count_ <= wanted_) return;
    move_smallest_forward(kept_.data(), count_, wanted_);
    count_ = wanted_;
    bound_ = P::margin(kept_[wanted_ - 1]);
  }

  // A margin that, most likely, a few more than are wanted are below.
  A guess(const A* margins, int64_t count) const {
    std::vector<A> sample;
    for (int64_t i = 0; i < count; i += kSampled - 3) {  // odd, unlike the widths of most maps
      sample.push_back(margins[i] == margins[i] ? margins[i] : A(-1));
    }
    const int64_t size = sample.size();
    const double expected = static_cast<double>(wanted_) * size / count;
    const int64_t rank = std::min(size - 1, static_cast<int64_t>(expected + 3 * std::sqrt(expected)) + 4);
    std::nth_element(sample.begin(), sample.begin() + rank, sample.end());
    return sample[rank];
  }

  int64_t wanted_, room_, count_ = 0;
  A bound_ = kNone;
  std::vector<Packed> kept_;
};

// The indices of the smallest margins of each image, in order. fill(image, begin, end, margins) computes some of them,
// in whole vectors.
template <typename P, typename Fill>
void write_smallest(int64_t images, int64_t points, int64_t wanted, int64_t cost_of_point, int64_t* index,
                    const Fill& fill) {
  using A = typename P::Margin;
  using Found = std::vector<typename P::Packed>;
  constexpr int64_t block = 1 << 16, grain = 1 << 15;
  if (images == 0 || wanted == 0) return;
  const int64_t threads = torch::stable::get_num_threads(), cost = checked_product({points, cost_of_point});
  const int64_t parts = std::max<int64_t>(1, std::min((threads + images - 1) / images, cost / grain));
  const auto write = [&](const Found& found, int64_t image) {
    for (int64_t i = 0; i < wanted; ++i) index[image * wanted + i] = P::index(found[i]);
  };
  std::vector<Found> found(parts > 1 ? images * parts : 0);
  parallel_for(0, images * parts, 1 + grain / (1 + cost / parts), [&](int64_t first, int64_t last) {
    const int64_t longest = (points + parts - 1) / parts;
    Scratch<A> margins(std::min(block, longest) + Vec<A>::size);
    for (int64_t item = first; item < last; ++item) {
      const int64_t image = item / parts, part = item % parts;
      const int64_t begin = points * part / parts, end = points * (part + 1) / parts;
      Smallest<P> smallest(wanted, end - begin);
      for (int64_t i = begin; i < end; i += block) {
        const int64_t stop = std::min(end, i + block);
        fill(image, i, stop, margins.data());
        smallest.add(margins.data(), stop - i, i);
      }
      if (parts > 1) found[item] = smallest.take();
      else write(smallest.take(), image);
    }
  });
  if (parts == 1) return;
  parallel_for(0, images, 1, [&](int64_t first, int64_t last) {
    for (int64_t image = first; image < last; ++image) {
      Found merged;
      for (int64_t part = 0; part < parts; ++part) {
        const Found before = std::move(merged), &more = found[image * parts + part];
        merged.clear();
        std::merge(before.begin(), before.end(), more.begin(), more.end(), std::back_inserter(merged));
        if (static_cast<int64_t>(merged.size()) > wanted) merged.resize(wanted);
      }
      write(merged, image);
    }
  });
}

// Calls function(packing) with the integers that suffice for so many points.
template <typename A, typename Function>
void with_packing(int64_t points, Function&& function) {
  if constexpr (std::is_same_v<A, double>) {
    function(Packing<double, int64_t, __int128>{});
  } else if (points <= int64_t(1) << 32) {
    function(Packing<float, int32_t, int64_t>{});
  } else {
    function(Packing<float, int32_t, __int128>{});
  }
}
