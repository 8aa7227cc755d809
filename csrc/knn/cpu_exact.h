// Exact distances and the order of neighbours, compiled once for each instruction set.

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
  // Nearest points to look for: one more where the point itself is then left out.
  int64_t wanted() const { return std::min(points, problem.ranks() + (problem.include_self ? 0 : 1)); }
};

PAPER_LAYERS_INLINE Vec<double> load_double(const double* p) { return load(p); }
PAPER_LAYERS_INLINE Vec<double> load_double(const float* p) {
  typedef float Floats __attribute__((vector_size(PAPER_LAYERS_VECTOR_BYTES / 2)));
  Floats half;
  std::memcpy(&half, p, sizeof(half));
  return Vec<double>(__builtin_convertvector(half, Vec<double>::Lanes));
}

// In float64, by differences: what decides which neighbour is nearer.
template <typename T>
double exact_distance(const T* a, const T* b, int64_t channels, bool inner) {
  using V = Vec<double>;
  V lanes(0.0);
  int64_t c = 0;
  for (; c + V::size <= channels; c += V::size) {
    const V x = load_double(a + c), y = load_double(b + c), difference = x - y;
    lanes = inner ? multiply_add(x, y, lanes) : multiply_add(difference, difference, lanes);
  }
  double total = 0;
  if (c > 0) {
    for (int64_t i = 0; i < V::size; ++i) total += lanes.lanes[i];
  }
  for (; c < channels; ++c) {
    const double x = a[c], y = b[c];
    total += inner ? x * y : (x - y) * (x - y);
  }
  return inner ? -total : total;
}

struct Found {
  double distance;
  int32_t index;
  friend bool operator<(const Found& a, const Found& b) {
    return a.distance < b.distance || (a.distance == b.distance && a.index < b.index);
  }
};

// So few are ordered by counting, for each, those that are smaller: partial sorting mostly takes mispredicted branches.
constexpr int64_t kFew = 128;

// Of count values, where there is room for one vector more.
template <typename T>
PAPER_LAYERS_INLINE typename Vec<T>::BitLanes count_smaller(const T* values, int64_t count, Vec<T> than) {
  typename Vec<T>::BitLanes smaller = {};
  for (int64_t i = 0; i < count; ++i) smaller -= Vec<T>(values[i]).lanes < than.lanes;
  return smaller;
}

template <typename T>
T value_of_rank_among_few(T* values, int64_t count, int64_t k) {
  using V = Vec<T>;
  std::fill_n(values + count, V::size, -std::numeric_limits<T>::infinity());  // never the largest
  using Bits = typename V::BitLanes;
  const Bits most = static_cast<std::decay_t<decltype(Bits()[0])>>(k) - Bits{};
  // The largest that at most k are smaller than.
  V largest(-std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < count; i += V::size) {
    const V block = load(values + i);
    largest = max_or_second(V(count_smaller(values, count, block) <= most ? block.lanes : largest.lanes), largest);
  }
  return largest_of(largest);
}

// The value of rank k, from 0, none of them NaN; there is room for one vector more. By bisection.
template <typename T>
T value_of_rank(T* values, int64_t count, int64_t k) {
  if (count <= kFew) return value_of_rank_among_few(values, count, k);
  using V = Vec<T>;
  using Bits = typename V::BitLanes;
  using Key = std::decay_t<decltype(Bits()[0])>;
  constexpr Key magnitude = std::numeric_limits<Key>::max();
  // Integers in the order of the numbers: of negative ones the magnitude's bits are flipped. It is its own inverse.
  const auto key = [](auto bits) { return bits ^ ((bits >> (8 * sizeof(Key) - 1)) & magnitude); };
  std::fill_n(values + count, V::size, std::numeric_limits<T>::infinity());
  Key low = magnitude, high = -magnitude - 1;
  for (int64_t i = 0; i < count; i += V::size) {
    const Bits keys = key(Bits(load(values + i).lanes));
    std::memcpy(static_cast<void*>(values + i), &keys, sizeof(keys));
  }
  const auto key_at = [&](int64_t i) {
    Key result;
    std::memcpy(&result, values + i, sizeof(result));
    return result;
  };
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, key_at(i));
    high = std::max(high, key_at(i));
  }
  while (low < high) {
    const Key middle = (low & high) + ((low ^ high) >> 1);  // rounded down, without overflow
    Bits most = {};
    for (int64_t i = 0; i < count; i += V::size) {
      Bits keys;
      std::memcpy(&keys, values + i, sizeof(keys));
      most -= keys <= middle;
    }
    int64_t reached = 0;
    for (int64_t i = 0; i < V::size; ++i) reached += most[i];
    if (reached > k) high = middle;
    else low = middle + 1;
  }
  const Key bits = key(low);
  T result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Puts the elements of ranks 0, dilation, 2 dilation ... in their places.
inline void order_ranks(Found* first, Found* last, int64_t rank, int64_t dilation) {
  while (last - first > 1) {
    const int64_t size = last - first;
    const int64_t next = (rank + dilation - 1) / dilation * dilation;  // the first wanted rank at or after `rank`
    if (next >= rank + size) return;
    if (dilation == 1 || size <= 32) return std::sort(first, last);
    const int64_t middle = next + (rank + size - 1 - next) / dilation / 2 * dilation;
    Found* nth = first + (middle - rank);
    std::nth_element(first, nth, last);
    order_ranks(first, nth, rank, dilation);
    first = nth + 1;
    rank = middle + 1;
  }
}

// Sorts a few without ties; false, and nothing done, otherwise.
inline bool order_few(Found* found, int64_t count) {
  using V = Vec<double>;
  if (count > kFew) return false;
  alignas(64) double distances[kFew + V::size];
  for (int64_t i = 0; i < count; ++i) distances[i] = found[i].distance;
  std::fill_n(distances + count, V::size, std::numeric_limits<double>::infinity());
  Found ordered[kFew];
  int64_t sum = 0;
  for (int64_t i = 0; i < count; i += V::size) {
    const auto nearer = count_smaller(distances, count, load(distances + i));
    for (int64_t lane = 0; lane < std::min(V::size, count - i); ++lane) {
      ordered[nearer[lane]] = found[i + lane];
      sum += nearer[lane];
    }
  }
  if (sum != count * (count - 1) / 2) return false;
  std::copy_n(ordered, count, found);
  return true;
}

// Writes the neighbours of a query, given a superset of the nearest.
template <typename T>
void write_neighbours(const Search<T>& search, int64_t query, Found* found, int64_t count) {
  const KnnProblem& problem = search.problem;
  if (!problem.include_self) {
    count = std::remove_if(found, found + count, [&](const Found& f) { return f.index == query; }) - found;
  }
  if (!order_few(found, count)) {
    if (count > problem.ranks()) {
      std::nth_element(found, found + problem.ranks() - 1, found + count);
      count = problem.ranks();
    }
    order_ranks(found, found + count, 0, problem.dilation);
  }
  for (int64_t r = 0; r < problem.k; ++r) {
    const int64_t rank = r * problem.dilation;
    const bool there = rank < count;
    search.index[query * problem.k + r] = there ? found[rank].index + search.offset : -1;
    search.distance[query * problem.k + r] =
        there ? static_cast<T>(found[rank].distance) : std::numeric_limits<T>::infinity();
  }
}

// Every pair, for clouds that are small or not finite.
template <typename T>
void search_pairs(const Search<T>& search) {
  torch::stable::parallel_for(0, search.queries, std::max<int64_t>(1, 16384 / (search.points + 1)), [&](int64_t begin, int64_t end) {
    std::vector<Found> found;
    for (int64_t i = begin; i < end; ++i) {
      found.clear();
      for (int64_t j = 0; j < search.points; ++j) {
        const double d =
            exact_distance(search.query_at(i), search.point_at(j), search.channels(), search.problem.inner);
        if (!std::isnan(d)) found.push_back({d, static_cast<int32_t>(j)});
      }
      write_neighbours(search, i, found.data(), found.size());
    }
  });
}
