// Margins of logits, and the smallest of them, compiled once for each instruction set.

template <typename T>
PAPER_LAYERS_INLINE auto load_up_to_end(const T* p, int64_t i, int64_t count) {
  constexpr int64_t size = decltype(load(p))::size;
  return i + size <= count ? load(p + i) : load(p + i, count - i);
}

// Writes whole vectors.
template <typename T, typename A>
void magnitudes(const T* logits, int64_t count, A* margins) {
  for (int64_t i = 0; i < count; i += Vec<A>::size) {
    const Vec<A> x = load_up_to_end(logits, i, count);
    store(margins + i, Vec<A>(x.lanes < 0 ? -x.lanes : x.lanes));
  }
}

template <bool careful, typename V>
PAPER_LAYERS_INLINE V larger(V a, V b) {
  if constexpr (careful) return V((a.lanes > b.lanes) | (a.lanes != a.lanes) ? a.lanes : b.lanes);
  else return max_or_second(a, b);
}

// Best minus second best of several classes. row(c, slot) returns the logits of class c; what it returned for the same
// slot before is no longer needed. Unless it is careful it stops and returns false where it may have seen a NaN
// (infinities of both signs pass for one), which the processor's maximum forgets. Writes whole vectors.
template <bool careful, typename A, typename Row>
bool subtract_second_best(int64_t classes, int64_t count, A* second, A* margins, Row&& row) {
  using V = Vec<A>;
  A* const best = margins;
  V sum(A(0));
  const V none(-std::numeric_limits<A>::infinity());
  const auto* single = classes % 2 == 1 ? row(0, 0) : nullptr;
  for (int64_t i = 0; i < count; i += V::size) {
    const V x = single == nullptr ? none : load_up_to_end(single, i, count);
    if (single != nullptr) sum = sum + x;
    store(best + i, x);
    store(second + i, none);
  }
  for (int64_t c = classes % 2; c < classes; c += 2) {
    const auto *first = row(c, 0), *other = row(c + 1, 1);
    for (int64_t i = 0; i < count; i += V::size) {
      // The next pixels of these classes, if rows are parts of maps.
      __builtin_prefetch(first + i + count, 0, 2);
      __builtin_prefetch(other + i + count, 0, 2);
      const V a = load_up_to_end(first, i, count), b = load_up_to_end(other, i, count), top = load(best + i);
      sum = sum + (a + b);
      const V high = larger<careful>(a, b), low = min_or_second(a, b);
      store(second + i, max_or_second(max_or_second(load(second + i), low), min_or_second(top, high)));
      store(best + i, larger<careful>(high, top));
    }
    if (!careful && total_of(sum.lanes != sum.lanes) != 0) return false;
  }
  for (int64_t i = 0; i < count; i += V::size) store(margins + i, load(best + i) - load(second + i));
  return true;
}

// The same for any logits.
template <typename A, typename Row>
void margins_of_classes(int64_t classes, int64_t count, A* second, A* margins, Row&& row) {
  if (subtract_second_best<false>(classes, count, second, margins, row)) return;
  subtract_second_best<true>(classes, count, second, margins, row);
}
