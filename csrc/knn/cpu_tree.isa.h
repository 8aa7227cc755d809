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

// To a point whose coordinates are `step` apart.
template <typename T>
double exact_distance(const T* query, const T* x, int64_t step) {
  double total = 0;
  for (int64_t d = 0; d < kDimensions; ++d) total += term<false>(double(query[d]), double(x[d * step]));
  return total;
}

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
      parallel_for(0, level.size(), 1, [&](int64_t begin, int64_t end) {
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
  // In the order of the leaves.
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
