// Queries that walk the tree, compiled once for each instruction set.

// Exact distances of points in the tree, as Selection asks for them: points are numbered as they lie in the leaves.
template <typename T>
struct TreeDistances {
  const Tree<T>& tree;
  std::atomic<int64_t>& left;  // exact distances, see spend()
  const TreePoint<T>* queries;
  // For each query, where exact distances had to decide: a point that is not before it, by distance and index, is not wanted.
  Found limits[kLeaf];

  static constexpr int32_t kUndecided = std::numeric_limits<int32_t>::max();
  bool is_decided(int64_t q) const { return limits[q].index != kUndecided; }
  bool may_hold(const typename Tree<T>::Node& node, int64_t q) const {
    return !is_decided(q) || Found{node.box.exact_distance(queries[q].x), node.first_index} < limits[q];
  }

  int64_t index(int32_t position) const { return tree.indices(0)[position]; }

  // The relative error of rounded distances, and the absolute error of distances that underflow.
  T uncertainty(int64_t q, T least, const T*, const int32_t*, int64_t) const { return most_uncertain(q, least); }
  T most_uncertain(int64_t, T least) const {
    return 16 * std::numeric_limits<T>::epsilon() * std::abs(least) + 16 * std::numeric_limits<T>::min();
  }

  void find(int64_t q, const int32_t* positions, int64_t count, Found* found) const {
    for (int64_t i = 0; i < count; ++i) {
      const T* at = tree.coordinates(positions[i] / kLeaf) + positions[i] % kLeaf;
      found[i] = {exact_distance(queries[q].x, at, kLeaf), tree.indices(0)[positions[i]]};
    }
  }

  T decided(int64_t q, const Found& found) {
    limits[q] = found;
    const T score = -static_cast<T>(found.distance);
    return score - most_uncertain(q, score);
  }
  // A tree is of no use if most points need exact distances, as for queries in the middle of a sphere.
  void spend(int64_t count) { left.fetch_sub(count, std::memory_order_relaxed); }
  bool gives_up() const { return left.load(std::memory_order_relaxed) < 0; }
};

// The neighbours of some queries that lie together.
template <typename T>
class TreeWalk {
  using V = Vec<T>;

 public:
  TreeWalk(const Search<T>& search, const Tree<T>& tree, std::atomic<int64_t>& left)
      : tree_(tree),
        exact_{tree, left, nullptr, {}},
        candidates_(kLeaf, search.wanted(), kLeaf),
        selection_(search, exact_, candidates_) {}

  // At most kLeaf queries.
  void run(const TreePoint<T>* queries, int64_t count) {
    exact_.queries = queries;
    count_ = count;
    group_ = Box<T>::empty();
    for (int64_t q = 0; q < kLeaf; ++q) {
      const bool there = q < count;  // the others look for nothing
      candidates_.clear(q, there ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::infinity());
      exact_.limits[q] = {0, there ? exact_.kUndecided : -1};
      for (int64_t d = 0; d < kDimensions; ++d) x_[d][q] = queries[there ? q : 0].x[d];
      if (there) group_.add(queries[q].x);
    }
    find_reach();
    if (tree_.leaves() > 0) visit(1, tree_.node(1).box.distance(group_));
    for (int64_t q = 0; q < count && !exact_.gives_up(); ++q) selection_.finish(q, queries[q].index);
  }

 private:
  // The bound that any of the queries needs.
  void find_reach() {
    V least(std::numeric_limits<T>::infinity());
    for (int64_t q = 0; q < kLeaf; q += V::size) {
      const V limit = load(&candidates_.limit(q));
      least = V(limit.lanes < least.lanes ? limit.lanes : least.lanes);
    }
    farthest_ = largest_of(V(-least.lanes));
    all_decided_ = true;
    for (int64_t q = 0; q < count_; ++q) all_decided_ &= exact_.is_decided(q);
  }

  bool may_hold(const typename Tree<T>::Node& node) const {
    bool may = !all_decided_;
    for (int64_t q = 0; q < count_ && !may; ++q) may = exact_.may_hold(node, q);
    return may;
  }

  void visit(int64_t i, T distance) {
    const auto& node = tree_.node(i);
    if (distance > farthest_ || !may_hold(node) || exact_.gives_up()) return;
    if (node.leaves.size() == 1) return scan(node);
    const T left = tree_.node(2 * i).box.distance(group_), right = tree_.node(2 * i + 1).box.distance(group_);
    // If the group straddles both boxes, its middle decides; among equally far points the first ones count.
    const int64_t d = node.dimension;
    const bool right_first = left != right ? right < left
                             : left > 0    ? tree_.node(2 * i + 1).first_index < tree_.node(2 * i).first_index
                                           : group_.low[d] / 2 + group_.high[d] / 2 > node.split;
    visit(2 * i + right_first, right_first ? right : left);
    visit(2 * i + !right_first, right_first ? left : right);
  }

  void scan(const typename Tree<T>::Node& leaf) {
    bool shrunk = false;
    for (int64_t first = 0; first < kLeaf; first += V::size) {
      V score(T(0));  // of a point in the nearest corner of the leaf's box
#pragma GCC unroll 4
      for (int64_t d = 0; d < kDimensions; ++d) {
        const V x = load(x_[d] + first);
        const V gap = max_or_second(max_or_second(V(leaf.box.low[d]) - x, x - V(leaf.box.high[d])), V(T(0)));
        score = score - gap * gap;
      }
      uint32_t near = lanes_not_below(score, load(&candidates_.limit(first)));
      for (; near != 0; near &= near - 1) {
        const int64_t q = first + __builtin_ctz(near);
        if (exact_.may_hold(leaf, q)) shrunk |= scan(leaf.leaves.begin, q);
      }
    }
    if (shrunk) find_reach();
  }

  // True if there is a new limit.
  bool scan(int64_t leaf, int64_t q) {
    const T* coordinates = tree_.coordinates(leaf);
    T* scores = candidates_.scores(q);
    int32_t* indices = candidates_.indices(q);
    int64_t n = candidates_.count(q);
    const T least = candidates_.limit(q);
    const V limit(least);
    for (int64_t p = 0; p < kLeaf; p += V::size) {
      V score(T(0));
#pragma GCC unroll 4
      for (int64_t d = 0; d < kDimensions; ++d) {
        const V difference = load(coordinates + d * kLeaf + p) - V(x_[d][q]);
        score = score - difference * difference;
      }
      n = append(scores, indices, n, score, indices_from<T>(leaf * kLeaf + p), lanes_not_below(score, limit));
    }
    candidates_.count(q) = n;
    // The first limit is worth a look at few.
    const bool first_limit = n >= candidates_.wanted && least == -std::numeric_limits<T>::infinity();
    const bool shrinks = first_limit || candidates_.full(q);
    if (shrinks) selection_.shrink(q);
    return shrinks;
  }

  const Tree<T>& tree_;
  TreeDistances<T> exact_;
  Candidates<T> candidates_;
  Selection<T, TreeDistances<T>> selection_;
  alignas(64) T x_[kDimensions][kLeaf];
  T farthest_;
  int64_t count_;
  bool all_decided_;
  Box<T> group_;
};

// The rows without NaN.
template <typename T>
std::vector<TreePoint<T>> tree_points(const T* rows, int64_t count, int64_t channels) {
  std::vector<TreePoint<T>> result;
  result.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    TreePoint<T> point{{}, static_cast<int32_t>(i)};
    std::copy_n(rows + i * channels, channels, point.x);
    if (std::none_of(point.x, point.x + channels, [](T x) { return std::isnan(x); })) result.push_back(point);
  }
  return result;
}

// Puts queries in the order of the tree's leaves. Returns where groups of them start that lie together, and the end.
template <typename T>
std::vector<int64_t> group(const Tree<T>& tree, std::vector<TreePoint<T>>& queries) {
  const int64_t count = queries.size();
  std::vector<int64_t> leaf(count), start(tree.leaves() + 2), groups;
  parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) leaf[i] = tree.leaves() > 0 ? tree.leaf_of(queries[i].x) : 0;
  });
  for (int64_t i = 0; i < count; ++i) ++start[leaf[i] + 1];
  std::partial_sum(start.begin(), start.end(), start.begin());
  for (size_t l = 0; l + 1 < start.size(); ++l) {
    for (int64_t s = start[l]; s < start[l + 1]; s += kLeaf) groups.push_back(s);
  }
  groups.push_back(count);
  const std::vector<TreePoint<T>> unordered(std::move(queries));
  queries.resize(count);
  for (int64_t i = 0; i < count; ++i) queries[start[leaf[i]]++] = unordered[i];
  return groups;
}

// So many exact distances for each query: more than there are points in the leaves that it most often looks at.
constexpr int64_t kExactInTree = 1024;
template <typename T>
int64_t most_exact(const Search<T>& search) {
  return search.queries * std::max(kExactInTree, 8 * search.wanted());
}

// Queries with NaN, of which all but so many are, have no neighbours.
template <typename T>
void write_none_for_nan(const Search<T>& search, int64_t others) {
  if (others == search.queries) return;
  std::fill_n(search.index, search.queries * search.problem.k, -1);
  std::fill_n(search.distance, search.queries * search.problem.k, std::numeric_limits<T>::infinity());
}

// False where it gave up.
template <typename T>
bool search_tree(const Search<T>& search) {
  const Tree<T> tree(tree_points(search.point, search.points, search.channels()));
  std::vector<TreePoint<T>> others;
  std::vector<int64_t> groups;
  if (search.searches_itself()) {  // then leaves are groups
    for (int64_t l = 0; l < tree.leaves(); ++l) groups.push_back(l * kLeaf);
    groups.push_back(tree.points().size());
  } else {
    others = tree_points(search.query, search.queries, search.channels());
    groups = group(tree, others);
  }
  const std::vector<TreePoint<T>>& queries = search.searches_itself() ? tree.points() : others;
  write_none_for_nan(search, queries.size());
  std::atomic<int64_t> left = most_exact(search);
  parallel_for(0, groups.size() - 1, 8, [&](int64_t begin, int64_t end) {
    TreeWalk<T> walk(search, tree, left);
    for (int64_t g = begin; g < end; ++g) walk.run(queries.data() + groups[g], groups[g + 1] - groups[g]);
    finish_streaming();
  });
  return left >= 0;
}
