// Exact k-nearest neighbours on the CPU, compiled once for each instruction set.
#include "knn/cpu_exact.h"
#include "knn/cpu_candidates.h"
#include "knn/cpu_tree.h"
#include "knn/cpu_panels.h"
#include "knn/cpu_pairs.h"
#include "knn/cpu_backward.h"

// So few pairs are not worth a tree or panels.
constexpr int64_t kFewPairs = 4096;

// Whether squared distances are finite, or NaN, in float64.
template <typename T>
bool squares_are_finite(const T* values, int64_t count) {
  constexpr T limit = std::is_same_v<T, float> ? std::numeric_limits<T>::max() : T(1e150);
  int32_t larger = 0;
  for (int64_t i = 0; i < count; ++i) larger |= std::abs(values[i]) > limit;
  return larger == 0;
}

template <typename T>
void knn(const KnnProblem& problem, const T* query, const T* points, int64_t* index, T* distance) {
  for (const Cloud& cloud : problem.clouds) {
    const int64_t q = cloud.queries.begin, p = cloud.points.begin, most = problem.ranks() + !problem.include_self;
    const Search<T> search{problem,
                           cloud.queries.size(),
                           // Points without channels are equally far: the first ones are the nearest.
                           problem.channels > 0 ? cloud.points.size() : std::min(cloud.points.size(), most),
                           query + q * problem.channels,
                           points + p * problem.channels,
                           index + q * problem.k,
                           distance + q * problem.k,
                           cloud.offset};
    if (search.queries * search.points <= kFewPairs || problem.channels == 0 ||
        !squares_are_finite(search.point, search.points * problem.channels) ||
        (!search.searches_itself() && !squares_are_finite(search.query, search.queries * problem.channels))) {
      search_pairs(search);
    } else if (problem.channels <= kDimensions && !problem.inner) {
      search_tree(search);
    } else {
      search_panels(search);
    }
  }
}
