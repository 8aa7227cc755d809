// Exact distances and the order of neighbours, compiled once for each instruction set.

struct Found {
  double distance;
  int32_t index;
  friend bool operator<(const Found& a, const Found& b) {
    return a.distance < b.distance || (a.distance == b.distance && a.index < b.index);
  }
};

// Where the neighbours of one query are written.
template <typename T>
struct Row {
  int64_t* index;
  T* distance;
  int64_t offset;
  bool streaming;  // Past the caches: rows of whole lines, in any order and many of them.

  void write(int64_t r, const Found& found) const {
    put(r, found.index + offset, static_cast<T>(found.distance));
  }
  void write_none(int64_t r) const { put(r, -1, std::numeric_limits<T>::infinity()); }

 private:
  void put(int64_t r, int64_t i, T d) const {
    if (streaming) {
      store_streaming(index + r, i);
      store_streaming(distance + r, d);
    } else {
      index[r] = i;
      distance[r] = d;
    }
  }
};

// One cloud, its rows from its own start.
template <typename T>
struct Search {
  const KnnProblem& problem;
  int64_t queries, points;
  const T *query, *point;
  int64_t* index;
  T* distance;
  int64_t offset;
  int64_t threads;

  int64_t channels() const { return problem.channels; }
  const T* query_at(int64_t i) const { return query + i * problem.channels; }
  const T* point_at(int64_t j) const { return point + j * problem.channels; }
  Row<T> row(int64_t i) const {
    const int64_t row_bytes = problem.k * sizeof(T);  // The rows of indices are once or twice as long.
    const auto addresses = reinterpret_cast<uintptr_t>(index) | reinterpret_cast<uintptr_t>(distance);
    const bool streaming = queries * row_bytes > kStreamingBytes && (row_bytes | addresses) % 64 == 0;
    return {index + i * problem.k, distance + i * problem.k, offset, streaming};
  }
  // Nearest points to look for: one more where the point itself is then left out.
  int64_t wanted() const { return std::min(points, problem.positions() + (problem.include_self ? 0 : 1)); }
  bool searches_itself() const { return query == point && queries == points; }
};

// The same number, as a product that is rounded by itself: fused into a sum it would differ between instruction sets.
template <typename Number>
PAPER_LAYERS_INLINE Number rounded(Number x) {
#if PAPER_LAYERS_VECTOR_BYTES == 64
  __asm__("" : "+v"(x));
#elif PAPER_LAYERS_VECTOR_BYTES == 32
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#elif !defined(PAPER_LAYERS_X86)  // which only fuses in the other sets
  __asm__("" : "+m"(x));
#endif
  return x;
}

// An exact distance is the sum of four sums, over channels 0, 4, 8 ..., over 1, 5, 9 ... and so on, after which come the
// channels beyond a multiple of four. All searches sum in this order, or equal distances would not be equal.
constexpr int64_t kSums = 4;

// Registers of float64 that hold some of the sums of a point, or all sums of kPoints points.
typedef double Part __attribute__((vector_size(PAPER_LAYERS_VECTOR_BYTES)));
constexpr int64_t kPart = PAPER_LAYERS_VECTOR_BYTES / sizeof(double);
constexpr int64_t kPoints = kPart / kSums > 1 ? kPart / kSums : 1, kParts = kPoints > 1 ? 1 : kSums / kPart;

// From one row, or of kPoints rows.
PAPER_LAYERS_INLINE Part load_part(const double* p, [[maybe_unused]] const double* next) {
#if PAPER_LAYERS_VECTOR_BYTES == 64
  return Part(_mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(p)), _mm256_loadu_pd(next), 1));
#else
  Part part;
  std::memcpy(&part, p, sizeof(part));
  return part;
#endif
}
PAPER_LAYERS_INLINE Part load_part(const float* p, [[maybe_unused]] const float* next) {
#if PAPER_LAYERS_VECTOR_BYTES == 64
  const __m256 first = _mm256_castps128_ps256(_mm_loadu_ps(p));
  return Part(_mm512_cvtps_pd(_mm256_insertf128_ps(first, _mm_loadu_ps(next), 1)));
#else
  typedef float Floats __attribute__((vector_size(PAPER_LAYERS_VECTOR_BYTES / 2)));
  Floats part;
  std::memcpy(&part, p, sizeof(part));
  return __builtin_convertvector(part, Part);
#endif
}

// A channel's summand of a distance, or to an inner product.
template <bool inner, typename Number>
PAPER_LAYERS_INLINE Number term(Number x, Number y) {
  if (inner) return rounded(x * y);
  const Number difference = x - y;
  return rounded(difference * difference);
}

// In float64, by differences: what decides which neighbour is nearer. Several at once, since each is a chain of sums.
template <int64_t many, bool inner, typename T>
PAPER_LAYERS_INLINE void exact_distances(const T* a, const T* const* b, int64_t channels, double* result) {
  static_assert(many % kPoints == 0);
  Part sums[many / kPoints][kParts];
  for (int64_t m = 0; m < many / kPoints; ++m) {
    for (int64_t part = 0; part < kParts; ++part) sums[m][part] = Part{};
  }
  int64_t c = 0;
  for (; c + kSums <= channels; c += kSums) {
#pragma GCC unroll 2
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t at = c + part * kPart;
      const Part x = load_part(a + at, a + at);
#pragma GCC unroll 4
      for (int64_t m = 0; m < many / kPoints; ++m) {
        sums[m][part] += term<inner>(x, load_part(b[m * kPoints] + at, b[(m + 1) * kPoints - 1] + at));
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t m = 0; m < many; ++m) {
    double total = 0;
    for (int64_t i = c; i < channels; ++i) total += term<inner>(double(a[i]), double(b[m][i]));
    for (int64_t s = 0; s < kSums && c > 0; ++s) {
      const int64_t place = m % kPoints * kSums + s;
      total += sums[m / kPoints][place / kPart][place % kPart];
    }
    result[m] = inner ? -total : total;
  }
}

template <bool inner, typename T>
void find_exactly(const Search<T>& search, const T* query, const int32_t* indices, int64_t count, Found* found) {
  constexpr int64_t most = 4 * kPoints;
  double distances[most];
  const T* rows[most];
  for (int64_t i = 0; i < count; i += most) {
    const int64_t here = std::min(most, count - i);
    // Beyond the end the last one again.
    for (int64_t m = 0; m < most; ++m) rows[m] = search.point_at(indices[std::min(i + m, count - 1)]);
    if (here > most / 2) exact_distances<most, inner>(query, rows, search.channels(), distances);
    else if (here > most / 4) exact_distances<most / 2, inner>(query, rows, search.channels(), distances);
    else exact_distances<most / 4, inner>(query, rows, search.channels(), distances);
    for (int64_t m = 0; m < here; ++m) found[i + m] = {distances[m], indices[i + m]};
  }
}

template <typename T>
void find_exactly(const Search<T>& search, const T* query, const int32_t* indices, int64_t count, Found* found) {
  if (search.problem.inner) find_exactly<true>(search, query, indices, count, found);
  else find_exactly<false>(search, query, indices, count, found);
}

// The neighbours of a query, among points that were found.
template <typename T>
void write_nearest(const Search<T>& search, int64_t query, Found* found, Found* end) {
  const KnnProblem& problem = search.problem;
  Found* const last = std::remove_if(found, end, [&](const Found& f) {
    return std::isnan(f.distance) || (!problem.include_self && f.index == query);
  });
  const int64_t count = std::min<int64_t>(last - found, problem.positions());
  if (found + count < last) std::nth_element(found, found + count, last);
  std::sort(found, found + count);
  const Row<T> row = search.row(query);
  for (int64_t r = 0; r < problem.k; ++r) {
    if (problem.position(r) < count) row.write(r, found[problem.position(r)]);
    else row.write_none(r);
  }
}

// Every point, for one query. `found` has room for all.
template <typename T>
void search_all(const Search<T>& search, int64_t query, const int32_t* all, Found* found) {
  find_exactly(search, search.query_at(query), all, search.points, found);
  write_nearest(search, query, found, found + search.points);
}

// Every pair, for clouds that are small.
template <typename T>
void search_pairs(const Search<T>& search) {
  const int64_t grain = std::max<int64_t>(1, 16384 / (search.points + 1));
  parallel_for(0, search.queries, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> all(search.points);
    std::iota(all.begin(), all.end(), 0);
    std::vector<Found> found(search.points);
    for (int64_t i = begin; i < end; ++i) search_all(search, i, all.data(), found.data());
    finish_streaming();
  });
}
