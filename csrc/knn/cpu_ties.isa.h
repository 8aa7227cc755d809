// Queries that walk the tree by exact distances alone, where squares overflow or underflow: of points that are
// infinitely far, or not at all, the first ones are the nearest, wherever they lie. They come first, the others are in
// the tree.

template <typename T>
class ExactWalk {
 public:
  ExactWalk(const Search<T>& search, const std::vector<TreePoint<T>>& first, const Tree<T>& others,
            std::atomic<int64_t>& left)
      : search_(search), first_(first), others_(others), left_(left) {}

  void run(const TreePoint<T>& query) {
    found_.clear();
    for (const TreePoint<T>& point : first_) found_.push_back({exact_distance(query.x, point.x, 1), point.index});
    std::make_heap(found_.begin(), found_.end());
    if (others_.leaves() > 0) visit(1, query.x);
    write_nearest(search_, query.index, found_.data(), found_.data() + found_.size());
  }

  bool gives_up() const { return left_.load(std::memory_order_relaxed) < 0; }

 private:
  // At most what its nearest point is.
  Found bound(int64_t i, const T* x) const {
    return {others_.node(i).box.exact_distance(x), others_.node(i).first_index};
  }

  void visit(int64_t i, const T* x) {
    if (!(bound(i, x) < found_.front()) || gives_up()) return;
    const Range leaves = others_.node(i).leaves;
    if (leaves.size() == 1) return scan(leaves.begin, x);
    const bool right_first = bound(2 * i + 1, x) < bound(2 * i, x);
    visit(2 * i + right_first, x);
    visit(2 * i + !right_first, x);
  }

  void scan(int64_t leaf, const T* x) {
    left_.fetch_sub(kLeaf, std::memory_order_relaxed);
    const int32_t* indices = others_.indices(leaf);
    for (int64_t p = 0; p < kLeaf && indices[p] >= 0; ++p) {
      const Found found{exact_distance(x, others_.coordinates(leaf) + p, kLeaf), indices[p]};
      if (!(found < found_.front())) continue;
      std::pop_heap(found_.begin(), found_.end());
      found_.back() = found;
      std::push_heap(found_.begin(), found_.end());
    }
  }

  const Search<T>& search_;
  const std::vector<TreePoint<T>>& first_;
  const Tree<T>& others_;
  std::atomic<int64_t>& left_;  // exact distances
  std::vector<Found> found_;  // a heap: the last one in front
};

// False where it gave up.
template <typename T>
bool search_ties(const Search<T>& search) {
  std::vector<TreePoint<T>> first = tree_points(search.point, search.points, search.channels());
  const auto end = first.begin() + std::min<int64_t>(first.size(), search.wanted());
  const Tree<T> others(std::vector<TreePoint<T>>(end, first.end()));
  first.erase(end, first.end());
  const std::vector<TreePoint<T>> queries = tree_points(search.query, search.queries, search.channels());
  write_none_for_nan(search, queries.size());
  std::atomic<int64_t> left = most_exact(search);
  parallel_for(0, queries.size(), 64, [&](int64_t begin, int64_t end) {
    ExactWalk<T> walk(search, first, others, left);
    for (int64_t q = begin; q < end && !walk.gives_up(); ++q) walk.run(queries[q]);
    finish_streaming();
  });
  return left >= 0;
}
