// Up to three channels: a balanced k-d tree over leaves of points. Queries of one leaf walk it together.

constexpr int64_t kLeaf = 32;
constexpr int64_t kDimensions = 3;
// A subtree of so many leaves is built by one thread.
constexpr int64_t kSubtreeLeaves = 128;

template <typename T>
struct TreePoint {
  T x[kDimensions];
  int32_t index;
};

// In the order of one dimension, equal ones by index.
template <typename T>
struct Before {
  int64_t dimension;
  bool operator()(const TreePoint<T>& a, const TreePoint<T>& b) const {
    const T x = a.x[dimension], y = b.x[dimension];
    return (x < y) | ((x == y) & (a.index < b.index));
  }
};

// As std::nth_element. Many are first split around elements of a sample, without branches, which nobody could predict.
template <typename T>
void select(TreePoint<T>* first, TreePoint<T>* nth, TreePoint<T>* last, Before<T> before) {
  constexpr int64_t kSample = 64;
  for (int64_t round = 0; last - first > 4 * kSample && round < 8; ++round) {
    TreePoint<T> sample[kSample];
    const int64_t count = last - first;
    for (int64_t i = 0; i < kSample; ++i) sample[i] = first[(2 * i + 1) * count / (2 * kSample)];
    // Off the wanted rank to the side where more are, so that the smaller part is likely kept.
    const int64_t rank = (nth - first) * kSample / count, off = round == 0 ? 0 : kSample / 16;
    const int64_t chosen = rank < kSample / 2 ? std::min(rank + off, kSample - 1) : std::max<int64_t>(rank - off, 0);
    std::nth_element(sample, sample + chosen, sample + kSample, before);
    const TreePoint<T> pivot = sample[chosen];
    TreePoint<T>* middle = first;
    for (TreePoint<T>* p = first; p < last; ++p) {
      const TreePoint<T> point = *p;
      *p = *middle;
      *middle = point;
      middle += before(point, pivot);
    }
    if (nth < middle) last = middle;
    else first = middle;
  }
  std::nth_element(first, nth, last, before);
}

template <typename T>
struct Box {
  T low[kDimensions], high[kDimensions];

  static Box empty() {
    Box box;
    std::fill_n(box.low, kDimensions, std::numeric_limits<T>::infinity());
    std::fill_n(box.high, kDimensions, -std::numeric_limits<T>::infinity());
    return box;
  }
  void add(const T* x) {
    for (int64_t d = 0; d < kDimensions; ++d) {
      low[d] = std::min(low[d], x[d]);
      high[d] = std::max(high[d], x[d]);
    }
  }
  T side(int64_t d) const { return high[d] - low[d]; }
  // The squared distance between the nearest points of two boxes.
  T distance(const Box& other) const {
    T total = 0;
    for (int64_t d = 0; d < kDimensions; ++d) {
      const T gap = std::max(std::max(low[d] - other.high[d], other.low[d] - high[d]), T(0));
      total += gap * gap;
    }
    return total;
  }
  // At most the exact distance of any point in the box: rounding is monotone.
  double exact_distance(const T* x) const {
    double total = 0;
    for (int64_t d = 0; d < kDimensions; ++d) {
      const double gap = std::max({double(low[d]) - x[d], double(x[d]) - high[d], 0.0});
      total += rounded(gap * gap);
    }
    return total;
  }
};

template <typename T>
class Tree {
 public:
  struct Node {
    Range leaves;
    Box<T> box;
    int32_t first_index;  // the least of its points
    int64_t dimension;
    T split;
  };

  // `points` without NaN.
  explicit Tree(std::vector<TreePoint<T>> points)
      : points_(std::move(points)),
        leaves_((points_.size() + kLeaf - 1) / kLeaf),
        coordinates_(leaves_ * kDimensions * kLeaf),
        indices_(leaves_ * kLeaf) {
    int64_t nodes = 2;
    while (nodes < 2 * leaves_) nodes *= 2;
    nodes_.resize(2 * nodes);
    std::vector<int64_t> level;
    if (leaves_ > 0) {
      nodes_[1].leaves = {0, leaves_};
      level.push_back(1);
    }
    while (!level.empty()) {  // a level at a time, its nodes in parallel
      torch::stable::parallel_for(0, level.size(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          if (nodes_[level[i]].leaves.size() <= kSubtreeLeaves) build_all(level[i]);
          else build(level[i]);
        }
      });
      std::vector<int64_t> next;
      for (const int64_t node : level) {
        if (nodes_[node].leaves.size() > kSubtreeLeaves) next.insert(next.end(), {2 * node, 2 * node + 1});
      }
      level = std::move(next);
    }
  }

  int64_t leaves() const { return leaves_; }
  // As they lie in the leaves.
  const std::vector<TreePoint<T>>& points() const { return points_; }
  const Node& node(int64_t i) const { return nodes_[i]; }
  // Leaf l: kLeaf numbers of each dimension, NaN after its last point, and the points' indices.
  const T* coordinates(int64_t leaf) const { return coordinates_.data() + leaf * kDimensions * kLeaf; }
  const int32_t* indices(int64_t leaf) const { return indices_.data() + leaf * kLeaf; }

  int64_t leaf_of(const T* x) const {
    int64_t i = 1;
    while (nodes_[i].leaves.size() > 1) i = 2 * i + (x[nodes_[i].dimension] >= nodes_[i].split);
    return nodes_[i].leaves.begin;
  }

 private:
  void build_all(int64_t i) {
    build(i);
    if (nodes_[i].leaves.size() > 1) {
      build_all(2 * i);
      build_all(2 * i + 1);
    }
  }

  // Bounds a node; fills it if it is a leaf, else halves its leaves along its longest side.
  void build(int64_t i) {
    Node& node = nodes_[i];
    const Range rows = {node.leaves.begin * kLeaf, std::min<int64_t>(node.leaves.end * kLeaf, points_.size())};
    node.box = Box<T>::empty();
    node.first_index = std::numeric_limits<int32_t>::max();
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      node.box.add(points_[p].x);
      node.first_index = std::min(node.first_index, points_[p].index);
    }
    if (node.leaves.size() == 1) return fill(node.leaves.begin, rows);
    node.dimension = 0;
    for (int64_t d = 1; d < kDimensions; ++d) {
      if (node.box.side(d) > node.box.side(node.dimension)) node.dimension = d;
    }
    const int64_t middle = (node.leaves.begin + node.leaves.end) / 2, d = node.dimension;
    TreePoint<T>* const points = points_.data();
    select(points + rows.begin, points + middle * kLeaf, points + rows.end, Before<T>{d});
    node.split = points_[middle * kLeaf].x[d];
    nodes_[2 * i].leaves = {node.leaves.begin, middle};
    nodes_[2 * i + 1].leaves = {middle, node.leaves.end};
  }

  void fill(int64_t leaf, Range rows) {
    for (int64_t p = 0; p < kLeaf; ++p) {
      const bool there = rows.begin + p < rows.end;
      for (int64_t d = 0; d < kDimensions; ++d) {
        coordinates_[(leaf * kDimensions + d) * kLeaf + p] =
            there ? points_[rows.begin + p].x[d] : std::numeric_limits<T>::quiet_NaN();
      }
      indices_[leaf * kLeaf + p] = there ? points_[rows.begin + p].index : -1;
    }
  }

  std::vector<TreePoint<T>> points_;
  const int64_t leaves_;
  std::vector<Node> nodes_;  // node i has the children 2 i and 2 i + 1
  Scratch<T> coordinates_;
  Scratch<int32_t> indices_;
};

// Exact distances of points in the tree, as Selection asks for them: points are numbered as they lie in the leaves.
template <typename T>
struct TreeDistances {
  const Tree<T>& tree;
  const TreePoint<T>* queries;
  // Of each query, where exact distances had to decide: what is not before it, by distance and index, is not wanted.
  Found limits[kLeaf];

  static constexpr int32_t kUndecided = std::numeric_limits<int32_t>::max();
  bool is_decided(int64_t q) const { return limits[q].index != kUndecided; }
  bool may_hold(const typename Tree<T>::Node& node, int64_t q) const {
    return !is_decided(q) || Found{node.box.exact_distance(queries[q].x), node.first_index} < limits[q];
  }

  int64_t index(int32_t position) const { return tree.indices(0)[position]; }

  // Rounded distances are relatively so near to the exact ones, but for those that underflow.
  T uncertainty(int64_t q, T least, const T*, const int32_t*, int64_t) const { return most_uncertain(q, least); }
  T most_uncertain(int64_t, T least) const {
    return 16 * std::numeric_limits<T>::epsilon() * std::abs(least) + 16 * std::numeric_limits<T>::min();
  }

  void find(int64_t q, const int32_t* positions, int64_t count, Found* found) const {
    for (int64_t i = 0; i < count; ++i) {
      const T* at = tree.coordinates(positions[i] / kLeaf) + positions[i] % kLeaf;
      double total = 0;
      for (int64_t d = 0; d < kDimensions; ++d) {
        total += term<false>(double(queries[q].x[d]), double(at[d * kLeaf]));
      }
      found[i] = {total, tree.indices(0)[positions[i]]};
    }
  }

  T decided(int64_t q, const Found& found) {
    limits[q] = found;
    const T score = -static_cast<T>(found.distance);
    return score - most_uncertain(q, score);
  }
  void spend(int64_t) const {}
};

// The neighbours of some queries that lie together.
template <typename T>
class TreeWalk {
  using V = Vec<T>;

 public:
  TreeWalk(const Search<T>& search, const Tree<T>& tree)
      : tree_(tree),
        exact_{tree, nullptr, {}},
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
    for (int64_t q = 0; q < count; ++q) selection_.finish(q, queries[q].index);
  }

 private:
  // What any of the queries needs.
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
    if (distance > farthest_ || !may_hold(node)) return;
    if (node.leaves.size() == 1) return scan(node);
    const T left = tree_.node(2 * i).box.distance(group_), right = tree_.node(2 * i + 1).box.distance(group_);
    // Where the group straddles both its middle tells; of points that are equally far the first ones count.
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

  // Whether there is a new limit.
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
  torch::stable::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
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

template <typename T>
void search_tree(const Search<T>& search) {
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
  if (static_cast<int64_t>(queries.size()) < search.queries) {  // queries with NaN have no neighbours
    std::fill_n(search.index, search.queries * search.problem.k, -1);
    std::fill_n(search.distance, search.queries * search.problem.k, std::numeric_limits<T>::infinity());
  }
  torch::stable::parallel_for(0, groups.size() - 1, 8, [&](int64_t begin, int64_t end) {
    TreeWalk<T> walk(search, tree);
    for (int64_t g = begin; g < end; ++g) walk.run(queries.data() + groups[g], groups[g + 1] - groups[g]);
    finish_streaming();
  });
}
