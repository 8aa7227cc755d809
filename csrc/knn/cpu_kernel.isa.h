// Exact k-nearest neighbours on the CPU, compiled once for each instruction set.
#include "knn/cpu_exact.isa.h"
#include "knn/cpu_sort.isa.h"
#include "knn/cpu_candidates.isa.h"
#include "knn/cpu_tree.isa.h"
#include "knn/cpu_walk.isa.h"
#include "knn/cpu_ties.isa.h"
#include "knn/cpu_scores.isa.h"
#include "knn/cpu_pack.isa.h"
#include "knn/cpu_panels.isa.h"
#include "knn/cpu_dense.isa.h"
#include "knn/cpu_pairs.isa.h"
#include "knn/cpu_subset.isa.h"
#include "knn/cpu_backward.isa.h"

// Up to so many pairs, a tree or panels don't pay.
constexpr int64_t kFewPairs = 256;
// Up to so many points, panels are faster than a tree.
constexpr int64_t kFewInSpace = 512;

// The coordinates other than NaN.
struct Extremes {
  bool infinite = false;
  bool large = false;  // their squares overflow in T
  int64_t beyond = 0;  // squares of the differences of so many underflow in T, or overflow in float64

  template <typename T>
  void add(const T* values, int64_t count) {
    constexpr bool single = std::is_same_v<T, float>;
    constexpr T most = std::numeric_limits<T>::max(), limit = single ? T(1e18) : T(1e150);
    constexpr T little = single ? T(1e-14) : T(1e-154), much = single ? most : T(2e154);
    constexpr int64_t block = 1 << 16;
    for (int64_t first = 0; first < count; first += block) {
      int32_t infinities = 0, larges = 0, beyonds = 0;
      for (int64_t i = first; i < std::min(count, first + block); ++i) {
        const T x = std::abs(values[i]);
        infinities += x > most;
        larges += (x > limit) & (x <= most);
        beyonds += ((x < little) & (x > 0)) | ((x > much) & (x <= most));
      }
      infinite |= infinities > 0;
      large |= larges > 0;
      beyond += beyonds;
    }
  }
};

// For any rows.
template <typename T>
void search_exactly(const Search<T>& search) {
  if constexpr (std::is_same_v<T, double>) {
    search_panels(search, Scores::exact);
  } else {
    search_rows<double>(search, all_rows(search.queries), all_rows(search.points), {},
                        [](const Search<double>& in_double) { search_panels(in_double, Scores::exact); });
  }
}

// Up to three channels, without infinities.
template <typename T>
void search_space(const Search<T>& search, bool scalable = true) {
  if (scalable && search.points <= kFewInSpace && search_panels(search, Scores::products)) return;
  if (!search_tree(search)) search_exactly(search);
}

// Many channels, without infinities.
template <typename T>
void search_channels(const Search<T>& search) {
  if (search_panels(search, Scores::products)) return;
  const auto again = [](const Search<T>& search, bool fewer) {
    if (fewer && search_panels(search, Scores::products)) return;
    const bool differences = std::is_same_v<T, float> && !search.problem.inner;
    if (!differences || !search_panels(search, Scores::differences)) search_exactly(search);
  };
  const Rows kept = without_copies(search);
  if (static_cast<int64_t>(kept.size()) == search.points) return again(search, false);
  search_rows<T>(search, all_rows(search.queries), kept, {}, [&](const Search<T>& fewer) { again(fewer, true); });
}

template <typename T>
void search_cloud(const Search<T>& search);

// The rows without infinities, and the others apart.
template <typename T>
void search_finite(const Search<T>& search) {
  const int64_t channels = search.channels();
  Rows queries, infinite_queries, points, infinite_points;
  for (int64_t i = 0; i < search.queries; ++i) {
    if (has_nan(search.query_at(i), channels)) {
      for (int64_t r = 0; r < search.problem.k; ++r) search.row(i).write_none(r);
    } else {
      (is_finite(search.query_at(i), channels) ? queries : infinite_queries).push_back(i);
    }
  }
  for (int64_t j = 0; j < search.points; ++j) {
    if (has_nan(search.point_at(j), channels)) continue;
    (is_finite(search.point_at(j), channels) ? points : infinite_points).push_back(j);
  }
  search_rows<T>(search, queries, points, infinite_points, [](const Search<T>& finite) { search_cloud(finite); });
  search_infinite(search, infinite_queries);
}

template <typename T>
void search_cloud(const Search<T>& search) {
  const int64_t channels = search.channels();
  const bool inner = search.problem.inner, tree = channels <= kDimensions && !inner;
  if (search.queries * search.points <= kFewPairs) return search_pairs(search);
  if (channels == 0) {
    return search_rows<T>(search, all_rows(search.queries), without_copies(search), {}, search_pairs<T>);
  }
  Extremes extremes;
  extremes.add(search.point, search.points * channels);
  if (!search.searches_itself()) extremes.add(search.query, search.queries * channels);
  const bool many = 16 * extremes.beyond > search.points * channels;
  const bool overflows = extremes.large && std::is_same_v<T, double>;  // in exact distances, too
  if (extremes.infinite) {
    if (inner || overflows) search_exactly(search);
    else search_finite(search);
  } else if (!tree) {
    if (overflows) search_exactly(search);
    else search_channels(search);
  } else if (!many && (overflows || !extremes.large)) {  // few large ones do no harm in float64
    search_space(search, !extremes.large);
  } else if constexpr (std::is_same_v<T, double>) {
    if (!search_ties(search)) search_exactly(search);
  } else {
    search_rows<double>(search, all_rows(search.queries), all_rows(search.points), {},
                        [](const Search<double>& in_double) { search_space(in_double); });
  }
}

// Clouds that are an equal share of the work or less are claimed by single threads; all threads share the others.
template <typename T>
void knn(const KnnProblem& problem, const T* query, const T* points, int64_t* index, T* distance) {
  const int64_t count = problem.clouds.size(), threads = torch::stable::get_num_threads();
  const auto work = [&](const Cloud& cloud) {
    return static_cast<double>(cloud.queries.size()) * cloud.points.size() * (problem.channels + 16);
  };
  double total = 0;
  for (const Cloud& cloud : problem.clouds) total += work(cloud);
  const auto search = [&](int64_t i, int64_t threads) {
    const Cloud& cloud = problem.clouds[i];
    const int64_t q = cloud.queries.begin, p = cloud.points.begin, most = problem.positions() + !problem.include_self;
    search_cloud(Search<T>{problem,
                           cloud.queries.size(),
                           // Points without channels are equally far: the first ones are the nearest.
                           problem.channels > 0 ? cloud.points.size() : std::min(cloud.points.size(), most),
                           query + q * problem.channels,
                           points + p * problem.channels,
                           index + q * problem.k,
                           distance + q * problem.k,
                           cloud.offset,
                           threads});
  };
  std::vector<int64_t> claimed;
  for (int64_t i = 0; i < count; ++i) {
    if (work(problem.clouds[i]) * threads > total) search(i, threads);
    else claimed.push_back(i);
  }
  // The last ones, if they are too few for all threads.
  const int64_t few = count < 4 * threads && threads > 1 ? claimed.size() % threads : 0;
  for (int64_t i = 0; i < few; ++i) {
    search(claimed.back(), threads);
    claimed.pop_back();
  }
  if (claimed.empty()) return;
  const int64_t least = std::min<int64_t>(threads, claimed.size());
  Team::run(std::min<double>(least, 1 + total / kThreadWork), 1, [&](Team::Each each) {
    each(claimed.size(), [&](int64_t i) { search(claimed[i], 1); });
  });
}
