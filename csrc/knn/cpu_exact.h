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
  int64_t wanted() const { return std::min(points, problem.ranks() + (problem.include_self ? 0 : 1)); }
  bool searches_itself() const { return query == point && queries == points; }
};

PAPER_LAYERS_INLINE Vec<double> load_double(const double* p) { return load(p); }
PAPER_LAYERS_INLINE Vec<double> load_double(const float* p) {
  typedef float Floats __attribute__((vector_size(PAPER_LAYERS_VECTOR_BYTES / 2)));
  Floats half;
  std::memcpy(&half, p, sizeof(half));
  return Vec<double>(__builtin_convertvector(half, Vec<double>::Lanes));
}

// In float64, by differences: what decides which neighbour is nearer. Several at once, since each is a chain of sums.
template <int64_t many, bool inner, typename T>
PAPER_LAYERS_INLINE void exact_distances(const T* a, const T* const* b, int64_t channels, double* result) {
  using V = Vec<double>;
  V lanes[many];
  for (int64_t m = 0; m < many; ++m) lanes[m] = V(0.0);
  int64_t c = 0;
  for (; c + V::size <= channels; c += V::size) {
    const V x = load_double(a + c);
#pragma GCC unroll 4
    for (int64_t m = 0; m < many; ++m) {
      const V y = load_double(b[m] + c), difference = x - y;
      lanes[m] = inner ? multiply_add(x, y, lanes[m]) : multiply_add(difference, difference, lanes[m]);
    }
  }
#pragma GCC unroll 4
  for (int64_t m = 0; m < many; ++m) {
    double total = total_of(lanes[m].lanes);
    for (int64_t i = c; i < channels; ++i) {
      const double x = a[i], y = b[m][i];
      total += inner ? x * y : (x - y) * (x - y);
    }
    result[m] = inner ? -total : total;
  }
}

template <bool inner, typename T>
void find_exactly(const Search<T>& search, const T* query, const int32_t* indices, int64_t count, Found* found) {
  constexpr int64_t many = 4;
  double distances[many];
  const T* rows[many];
  int64_t i = 0;
  for (; i + many <= count; i += many) {
    for (int64_t m = 0; m < many; ++m) rows[m] = search.point_at(indices[i + m]);
    exact_distances<many, inner>(query, rows, search.channels(), distances);
    for (int64_t m = 0; m < many; ++m) found[i + m] = {distances[m], indices[i + m]};
  }
  for (; i < count; ++i) {
    rows[0] = search.point_at(indices[i]);
    exact_distances<1, inner>(query, rows, search.channels(), distances);
    found[i] = {distances[0], indices[i]};
  }
}

template <typename T>
void find_exactly(const Search<T>& search, const T* query, const int32_t* indices, int64_t count, Found* found) {
  if (search.problem.inner) find_exactly<true>(search, query, indices, count, found);
  else find_exactly<false>(search, query, indices, count, found);
}

// Every point, for one query. `found` has room for all.
template <typename T>
void search_all(const Search<T>& search, int64_t query, const int32_t* all, Found* found) {
  const KnnProblem& problem = search.problem;
  find_exactly(search, search.query_at(query), all, search.points, found);
  Found* const last = std::remove_if(found, found + search.points, [&](const Found& f) {
    return std::isnan(f.distance) || (!problem.include_self && f.index == query);
  });
  const int64_t count = std::min<int64_t>(last - found, problem.ranks());
  if (found + count < last) std::nth_element(found, found + count, last);
  std::sort(found, found + count);
  const Row<T> row = search.row(query);
  for (int64_t r = 0; r < problem.k; ++r) {
    if (problem.rank(r) < count) row.write(r, found[problem.rank(r)]);
    else row.write_none(r);
  }
}

// Every pair, for clouds that are small or not finite.
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
