// Searches of some of a cloud's rows, or of rows of another type, in place of the cloud.

using Rows = std::vector<int32_t>;

inline Rows all_rows(int64_t count) {
  Rows rows(count);
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

template <typename S, typename T>
std::vector<S> copy_rows(const T* from, const Rows& rows, int64_t channels) {
  std::vector<S> result(rows.size() * channels);
  for (size_t i = 0; i < rows.size(); ++i) std::copy_n(from + rows[i] * channels, channels, result.data() + i * channels);
  return result;
}

// The neighbours of some queries among some points, which run(search) finds, and after them `far` points, which are
// infinitely far. All are ascending; `points` may lack what has as many equal rows before it as there are wanted.
template <typename S, typename T, typename Run>
void search_rows(const Search<T>& search, const Rows& queries, const Rows& points, const Rows& far, const Run& run) {
  const KnnProblem& problem = search.problem;
  const int64_t channels = problem.channels, count = queries.size(), others = points.size();
  const int64_t wanted = std::min<int64_t>(others, search.wanted());
  const bool same = search.searches_itself() && queries == points;
  const std::vector<S> point_rows = copy_rows<S>(search.point, points, channels);
  const std::vector<S> query_rows = same ? std::vector<S>() : copy_rows<S>(search.query, queries, channels);
  // So many at a time that their neighbours take little memory.
  const int64_t step = same ? std::max<int64_t>(1, count) : 1 + (int64_t{1} << 22) / (1 + wanted);
  const KnnProblem all_positions{{}, channels, wanted, 1, problem.inner, true};
  std::vector<int64_t> index(std::min(step, count) * wanted);
  std::vector<S> distance(index.size());
  for (int64_t first = 0; first < count; first += step) {
    const int64_t here = std::min(step, count - first);
    const S* const q = same ? point_rows.data() : query_rows.data() + first * channels;
    if (wanted > 0) {
      run(Search<S>{all_positions, here, others, q, point_rows.data(), index.data(), distance.data(), 0,
                    search.threads});
    }
    parallel_for(0, here, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t query = queries[first + i], *const found = index.data() + i * wanted;
        const int64_t near = std::find(found, found + wanted, -1) - found, all = near + far.size();
        int64_t own = all;  // the place of what is left out
        for (int64_t p = 0; p < near && !problem.include_self; ++p) {
          if (points[found[p]] == query) own = p;
        }
        const Row<T> row = search.row(query);
        for (int64_t r = 0; r < problem.k; ++r) {
          const int64_t rank = problem.position(r), place = rank + (rank >= own);
          if (place < near) row.write(r, {distance[i * wanted + place], points[found[place]]});
          else if (place < all) row.write(r, {std::numeric_limits<double>::infinity(), far[place - near]});
          else row.write_none(r);
        }
      }
      finish_streaming();
    });
  }
}

// The points, except points after at least as many equal ones as are wanted: those are never neighbours.
template <typename T>
Rows without_copies(const Search<T>& search) {
  const int64_t channels = search.channels(), wanted = search.wanted();
  Rows rows = all_rows(search.points), kept;
  const auto first_difference = [&](int32_t a, int32_t b) {
    const T *x = search.point_at(a), *y = search.point_at(b);
    return std::make_pair(std::mismatch(x, x + channels, y), x + channels);
  };
  std::sort(rows.begin(), rows.end(), [&](int32_t a, int32_t b) {
    const auto [at, end] = first_difference(a, b);
    return at.first == end ? a < b : *at.first < *at.second;
  });
  int64_t before = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    bool equal = false;
    if (i > 0) {
      const auto [at, end] = first_difference(rows[i - 1], rows[i]);
      equal = at.first == end;
    }
    before = equal ? before + 1 : 0;
    if (before < wanted) kept.push_back(rows[i]);
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

template <typename T>
bool is_finite(const T* row, int64_t channels) {
  return std::all_of(row, row + channels, [](T x) { return std::isfinite(x); });
}
template <typename T>
bool has_nan(const T* row, int64_t channels) {
  return std::any_of(row, row + channels, [](T x) { return std::isnan(x); });
}

// Queries with infinite coordinates: a point that is infinite in the same place with the same sign has distance NaN,
// all others are infinitely far. So the first points are neighbours.
template <typename T>
void search_infinite(const Search<T>& search, const Rows& queries) {
  const int64_t channels = search.channels(), wanted = search.wanted();
  const KnnProblem& problem = search.problem;
  parallel_for(0, queries.size(), 64, [&](int64_t begin, int64_t end) {
    const T* last = nullptr;
    Rows found;
    for (int64_t i = begin; i < end; ++i) {
      const T* const query = search.query_at(queries[i]);
      const bool as_last = last && std::equal(query, query + channels, last, [](T x, T y) {
        return x == y || (std::isfinite(x) && std::isfinite(y));
      });
      if (!as_last) {
        found.clear();
        for (int64_t j = 0; j < search.points && static_cast<int64_t>(found.size()) < wanted; ++j) {
          const T* const point = search.point_at(j);
          const bool there = std::equal(query, query + channels, point, [](T x, T y) { return !std::isnan(x - y); });
          if (there) found.push_back(j);
        }
      }
      last = query;
      const Row<T> row = search.row(queries[i]);
      for (int64_t r = 0; r < problem.k; ++r) {
        const int64_t rank = problem.position(r);  // None is the query itself, whose distance is NaN.
        if (rank < static_cast<int64_t>(found.size())) {
          row.write(r, {std::numeric_limits<double>::infinity(), found[rank]});
        } else {
          row.write_none(r);
        }
      }
    }
    finish_streaming();
  });
}
