// Candidates for the nearest points of queries, compiled once for each instruction set.
//
// Each candidate has a rounded score, larger for nearer points. Scores tell which points are surely not wanted and the
// order of points that are far enough apart; exact distances are computed only where they decide.

// Candidates of a range of queries.
template <typename T>
class Candidates {
 public:
  const int64_t wanted;

  // Up to `batch` candidates come before there is a look at their number.
  Candidates(int64_t queries, int64_t wanted, int64_t batch)
      : wanted(wanted),
        full_(full(wanted, batch)),
        room_(room(wanted, batch)),
        counts_(queries),
        limits_(queries),
        guesses_(queries),
        scores_(new T[queries * room_]),
        indices_(new int32_t[queries * room_]) {}

  static int64_t bytes(int64_t wanted, int64_t batch) { return room(wanted, batch) * (sizeof(T) + sizeof(int32_t)); }

  // The number of the first query.
  void start_at(int64_t q) { first_ = q; }

  int64_t& count(int64_t q) { return counts_[q - first_]; }
  T& limit(int64_t q) { return limits_[q - first_]; }  // points of lower scores are not wanted
  T guess(int64_t q) const { return guesses_[q - first_]; }  // the limit at first, if it has to be confirmed
  T* scores(int64_t q) { return scores_.get() + (q - first_) * room_; }
  int32_t* indices(int64_t q) { return indices_.get() + (q - first_) * room_; }
  int64_t room() const { return room_; }
  bool full(int64_t q) { return count(q) > full_; }
  void clear(int64_t q, T limit) {
    count(q) = 0;
    this->limit(q) = limit;
    guesses_[q - first_] = -std::numeric_limits<T>::infinity();
  }
  void clear_and_guess(int64_t q, T limit) {
    clear(q, limit);
    guesses_[q - first_] = limit;
  }

 private:
  static int64_t full(int64_t wanted, int64_t batch) { return 2 * wanted + batch / 2; }
  static int64_t room(int64_t wanted, int64_t batch) { return full(wanted, batch) + batch + Vec<T>::size; }

  int64_t first_ = 0;
  const int64_t full_, room_;
  std::vector<int64_t> counts_;
  std::vector<T> limits_, guesses_;
  std::unique_ptr<T[]> scores_;  // not initialized: most of it is never used
  std::unique_ptr<int32_t[]> indices_;
};

// As many indices as a vector of T has lanes.
template <typename T>
struct Indices {
  typedef int32_t Lanes __attribute__((vector_size(4 * Vec<T>::size)));
};

template <typename Lanes, size_t... I>
PAPER_LAYERS_INLINE Lanes counted_from(int32_t first, std::index_sequence<I...>) {
  return Lanes{static_cast<int32_t>(I)...} + first;
}
template <typename T>
PAPER_LAYERS_INLINE typename Indices<T>::Lanes indices_from(int64_t first) {
  using Lanes = typename Indices<T>::Lanes;
  return counted_from<Lanes>(static_cast<int32_t>(first), std::make_index_sequence<Vec<T>::size>());
}

template <typename T>
PAPER_LAYERS_INLINE typename Indices<T>::Lanes load_indices(const int32_t* p) {
  typename Indices<T>::Lanes index;
  std::memcpy(&index, p, sizeof(index));
  return index;
}

// Puts the lanes that are set behind n others, where there is room for a whole vector more. Returns the new n.
template <typename T>
PAPER_LAYERS_INLINE int64_t append(T* scores, int32_t* indices, int64_t n, Vec<T> score,
                                   typename Indices<T>::Lanes index, uint32_t lanes) {
#if PAPER_LAYERS_VECTOR_BYTES == 64
  // Compressed in registers: storing compressed to memory is slow on some processors.
  if constexpr (sizeof(T) == 4) {
    _mm512_storeu_ps(scores + n, _mm512_maskz_compress_ps(lanes, __m512(score.lanes)));
    _mm512_storeu_si512(indices + n, _mm512_maskz_compress_epi32(lanes, __m512i(index)));
  } else {
    _mm512_storeu_pd(scores + n, _mm512_maskz_compress_pd(lanes, __m512d(score.lanes)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(indices + n), _mm256_maskz_compress_epi32(lanes, __m256i(index)));
  }
  return n + __builtin_popcount(lanes);
#else
  for (; lanes != 0; lanes &= lanes - 1, ++n) {
    const int lane = __builtin_ctz(lanes);
    scores[n] = score.lanes[lane];
    indices[n] = index[lane];
  }
  return n;
#endif
}

// A number that at least `wanted` of the scores reach and, unless many are equal, not more than `most`. `low` is the
// least of them, which `at_low` reach, and `top` the largest; the search starts at a share of the way. The number of
// scores is one of whole vectors, and those that are NaN or less than `low` do not count.
template <typename T>
T limit_between(const T* scores, int64_t count, int64_t wanted, int64_t most, T low, int64_t at_low, T top, T share) {
  using V = Vec<T>;
  using Key = std::decay_t<decltype(typename V::BitLanes()[0])>;
  // Integers in the order of the numbers: of negative ones the magnitude's bits are flipped. It is its own inverse.
  const auto key = [](Key bits) { return bits ^ ((bits >> (8 * sizeof(Key) - 1)) & std::numeric_limits<Key>::max()); };
  const auto key_of = [&](T value) {
    Key bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return key(bits);
  };
  const auto value_of = [&](Key bits) {
    T value;
    bits = key(bits);
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  };
  T high = value_of(key_of(top) + 1);
  int64_t at_high = 0;  // how many reach it
  for (int64_t pass = 0; at_low > most; ++pass) {
    // First as if they lay evenly, then by halves, which ends for all.
    T middle = low + (high - low) * std::min(std::max(share, T(0.02)), T(0.98));
    if (pass >= 8 || !(middle > low && middle < high)) {
      const Key a = key_of(low), b = key_of(high);
      middle = value_of((a & b) + ((a ^ b) >> 1));  // rounded down, without overflow
      if (!(middle > low)) break;
    }
    const int64_t at_middle = count_not_below(scores, count, V(middle));
    if (at_middle >= wanted) low = middle, at_low = at_middle;
    else high = middle, at_high = at_middle;
    share = static_cast<T>(at_low - (wanted + most) / 2) / static_cast<T>(at_low - at_high);
  }
  return low;
}

// The same for any number of scores, where there is room for a vector more; and the largest score.
template <typename T>
std::pair<T, T> limit_reached_by(T* scores, int64_t count, int64_t wanted, int64_t most) {
  using V = Vec<T>;
  std::fill_n(scores + count, V::size, std::numeric_limits<T>::quiet_NaN());  // reach nothing
  V least(std::numeric_limits<T>::infinity()), largest(-std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < count; i += V::size) {
    const V block = load(scores + i);
    largest = max_or_second(block, largest);
    least = V(block.lanes < least.lanes ? block.lanes : least.lanes);
  }
  const T top = largest_of(largest), share = static_cast<T>(count - (wanted + most) / 2) / static_cast<T>(count);
  return {limit_between(scores, count, wanted, most, -largest_of(V(-least.lanes)), count, top, share), top};
}

// Picks the nearest among candidates. `Exact` knows of query q:
//   uncertainty(q, least, scores, indices, count)  scores from `least` on that differ by more are in the order of the
//                                                  exact distances
//   most_uncertain(q, least)                       the same of any points' scores
//   find(q, indices, count, found)                 exact distances
//   decided(q, found)                              a limit that no nearer point's score is below
//   spend(count)                                   that so many exact distances are found because scores do not decide
template <typename T, typename Exact>
class Selection {
 public:
  Selection(const Search<T>& search, Exact& exact, Candidates<T>& candidates)
      : search_(search),
        exact_(exact),
        candidates_(candidates),
        wanted_(candidates.wanted),
        sort_(candidates.room()),
        found_(candidates.room()),
        segments_(candidates.room()) {}

  // Keeps the candidates that may be among the nearest, and raises the limit for later ones.
  void shrink(int64_t q) {
    T* scores = candidates_.scores(q);
    int32_t* indices = candidates_.indices(q);
    int64_t& count = candidates_.count(q);
    if (count < wanted_) return;
    const auto [reached, largest] = limit_reached_by(scores, count, wanted_, wanted_ + wanted_ / 8);
    // The bound for all points will do if it is small.
    T uncertainty = exact_.most_uncertain(q, reached);
    if (!(uncertainty < (largest - reached) / 16)) uncertainty = exact_.uncertainty(q, reached, scores, indices, count);
    raise(q, reached - uncertainty);
    count = keep_above(candidates_.limit(q), scores, indices, count);
    if (!candidates_.full(q)) return;
    // Too many are equally near: their exact distances and indices decide.
    exact_.spend(count);
    exact_.find(q, indices, count, found_.data());
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    const auto last = order.begin() + wanted_ - 1;
    std::nth_element(order.begin(), last, order.end(), [&](int64_t a, int64_t b) { return found_[a] < found_[b]; });
    raise(q, exact_.decided(q, found_[*last]));
    std::sort(order.begin(), last + 1);
    for (int64_t i = 0; i < wanted_; ++i) {
      scores[i] = scores[order[i]];
      indices[i] = indices[order[i]];
    }
    count = wanted_;
  }

  // Writes the neighbours of query q to a row.
  void finish(int64_t q, int64_t row) {
    T* scores = candidates_.scores(q);
    int32_t* indices = candidates_.indices(q);
    if (candidates_.count(q) > std::max(kFew, wanted_ + wanted_ / 4)) shrink(q);
    if (!confirmed(q)) return finish_with_all(row);
    int64_t count = candidates_.count(q);
    if (!search_.problem.include_self) count = leave_out(row, scores, indices, count);
    if (count > 0 && !sort_few(scores, indices, count)) sort_(scores, indices, count);
    const Row<T> written = search_.row(row);
    const KnnProblem& problem = search_.problem;
    if (ordered(q, scores, std::min(count, problem.positions() + 1))) {
      const int64_t found = std::min(problem.k, problem.ranks_below(count));
      for (int64_t r = 0; r < found; ++r) indices[r] = indices[problem.position(r)];
      exact_.find(q, indices, found, found_.data());
      for (int64_t r = 0; r < found; ++r) written.write(r, found_[r]);
      for (int64_t r = found; r < problem.k; ++r) written.write_none(r);
      return;
    }
    const int64_t segments = find_segments(q, scores, indices, count);
    int64_t r = 0;
    Found* found = found_.data();
    for (int64_t s = 0; s < segments; ++s) {
      const Range segment = segments_[s];
      if (segment.size() > 1) std::sort(found, found + segment.size());
      for (; r < problem.k && problem.position(r) < segment.end; ++r) {
        written.write(r, found[problem.position(r) - segment.begin]);
      }
      found += segment.size();
    }
    for (; r < problem.k; ++r) written.write_none(r);
  }

 private:
  // Tells if enough points surely score more than all points that were skipped.
  bool confirmed(int64_t q) {
    const T guess = candidates_.guess(q);
    if (guess == -std::numeric_limits<T>::infinity() || candidates_.limit(q) > guess) return true;
    T* scores = candidates_.scores(q);
    const int64_t count = candidates_.count(q);
    std::fill_n(scores + count, Vec<T>::size, std::numeric_limits<T>::quiet_NaN());
    const T uncertainty = exact_.uncertainty(q, guess, scores, candidates_.indices(q), count);
    return count_not_below(scores, count, Vec<T>(guess + uncertainty)) >= wanted_;
  }

  void finish_with_all(int64_t row) {
    exact_.spend(search_.points);
    all_.resize(search_.points);
    std::iota(all_.begin(), all_.end(), 0);
    if (found_.size() < all_.size()) found_.resize(all_.size());
    search_all(search_, row, all_.data(), found_.data());
  }

  void raise(int64_t q, T limit) { candidates_.limit(q) = std::max(candidates_.limit(q), limit); }

  static int64_t keep_above(T limit, T* scores, int32_t* indices, int64_t count) {
    using V = Vec<T>;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i += V::size) {
      const V score = load(scores + i);
      const auto index = load_indices<T>(indices + i);
      uint32_t lanes = lanes_not_below(score, V(limit));
      if (count - i < V::size) lanes &= (1u << (count - i)) - 1;
      kept = append(scores, indices, kept, score, index, lanes);
    }
    return kept;
  }

  int64_t leave_out(int64_t row, T* scores, int32_t* indices, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      if (exact_.index(indices[i]) != row) continue;
      scores[i] = scores[count - 1];
      indices[i] = indices[count - 1];
      return count - 1;
    }
    return count;
  }

  // Tells if sorted scores lie so far apart that they are surely in the order of the exact distances.
  bool ordered(int64_t q, const T* scores, int64_t count) const {
    using V = Vec<T>;
    if (count == 0) return true;
    const V uncertainty(exact_.most_uncertain(q, scores[count - 1]));
    uint32_t near = 0;
    for (int64_t i = 1; i < count; i += V::size) {
      uint32_t lanes = lanes_not_below(load(scores + i), load(scores + i - 1) - uncertainty);
      if (count - i < V::size) lanes &= (1u << (count - i)) - 1;
      near |= lanes;
    }
    return near == 0;
  }

  // Splits sorted candidates where the order of the exact distances is known, and computes the distances of segments
  // that hold a wanted rank. Returns the number of these segments.
  int64_t find_segments(int64_t q, const T* scores, int32_t* indices, int64_t count) {
    if (count == 0) return 0;
    const KnnProblem& problem = search_.problem;
    const T uncertainty = exact_.uncertainty(q, scores[count - 1], scores, indices, count);
    const auto near = [&](int64_t i) { return scores[i] >= scores[i - 1] - uncertainty; };
    int64_t segments = 0, chosen = 0, end = 0;
    for (int64_t r = 0; r < problem.k && problem.position(r) < count; ++r) {
      const int64_t rank = problem.position(r);
      if (rank < end) continue;
      int64_t begin = rank;
      while (begin > end && near(begin)) --begin;
      for (end = rank + 1; end < count && near(end);) ++end;
      segments_[segments++] = {begin, end};
      if (chosen < begin) std::copy(indices + begin, indices + end, indices + chosen);
      chosen += end - begin;
    }
    exact_.find(q, indices, chosen, found_.data());
    return segments;
  }

  const Search<T>& search_;
  Exact& exact_;
  Candidates<T>& candidates_;
  const int64_t wanted_;
  RoundedSort<T> sort_;
  std::vector<int32_t> all_;
  std::vector<Found> found_;
  std::vector<Range> segments_;
};
