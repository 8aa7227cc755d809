// The pairs of panels that are compared, and their threads.

// Candidates of all the rows of a cloud may take so much memory; and so much for a row, or they push the points, which
// exact distances need, out of the caches.
constexpr int64_t kCandidateBytes = int64_t{1} << 27, kRowBytes = 8192;
// Elements of panels that stay in the second-level cache while others pass by.
constexpr int64_t kCachedElements = 32768;

// A cloud that searches itself: the products of two panels serve the rows of both. Panels are split in blocks, and
// threads work on pairs of blocks that have none in common.
template <typename T>
class SymmetricSearch {
 public:
  SymmetricSearch(PanelDistances<T>& exact, int64_t wanted)
      : exact_(exact), panels_(exact.points.count), candidates_(panels_ * width, wanted, width) {
    const int64_t threads = torch::stable::get_num_threads();
    blocks_ = threads == 1 ? 1 : std::max<int64_t>(1, std::min(2 * threads, panels_ / 2) / 2 * 2);
  }

  static bool fits(int64_t panels, int64_t wanted) {
    const int64_t row = Candidates<T>::bytes(wanted, width);
    return row <= kRowBytes && panels * width * row <= kCandidateBytes;
  }

  void run() {
    each(blocks_, [&](PanelSearch<T>& search, int64_t i) {
      for (int64_t p = block(i).begin; p < block(i).end; ++p) search.start(p);
      compare(search, block(i), block(i));
    });
    // A tournament: in every round each block meets another one; the last stays in its place, the others move on.
    const int64_t moving = blocks_ - 1;
    for (int64_t round = 0; round < moving; ++round) {
      each(blocks_ / 2, [&](PanelSearch<T>& search, int64_t i) {
        const int64_t a = (round + i) % moving, b = i == 0 ? moving : (round + moving - i) % moving;
        compare(search, block(a), block(b));
      });
    }
    each(panels_, [](PanelSearch<T>& search, int64_t p) { search.finish(p); });
  }

 private:
  static constexpr int64_t width = Panels<T>::width;

  template <typename Body>
  void each(int64_t count, const Body& body) {
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      PanelSearch<T> search(exact_, candidates_);
      for (int64_t i = begin; i < end; ++i) body(search, i);
      finish_streaming();
    });
  }

  Range block(int64_t i) const { return {i * panels_ / blocks_, (i + 1) * panels_ / blocks_}; }

  void compare(PanelSearch<T>& search, Range rows, Range columns) {
    const int64_t step = std::max<int64_t>(1, kCachedElements / (width * exact_.points.channels));
    for (int64_t first = columns.begin; first < columns.end; first += step) {
      const int64_t last = std::min(columns.end, first + step);
      for (int64_t a = rows.begin; a < rows.end; ++a) {
        const int64_t start = rows.begin == columns.begin ? std::max(a, first) : first;
        for (int64_t b = start; b < last; ++b) search.compare_both(a, b);
      }
    }
  }

  PanelDistances<T>& exact_;
  const int64_t panels_;
  int64_t blocks_;
  Candidates<T> candidates_;
};

// False where it gave up, because too many points are as near as makes no difference to the scores.
template <typename T>
bool search_panels(const Search<T>& search, Scores scores) {
  constexpr int64_t width = Panels<T>::width;
  const Frame<T> frame(search, scores);
  const Panels<T> points(search, scores, frame, search.point, search.points);
  if (search.searches_itself() && SymmetricSearch<T>::fits(points.count, search.wanted())) {
    PanelDistances<T> exact(search, frame, points, points);
    SymmetricSearch<T>(exact, search.wanted()).run();
    return !exact.gives_up();
  }
  const Panels<T> queries(search, scores, frame, search.query, search.queries);
  PanelDistances<T> exact(search, frame, queries, points);
  parallel_for(0, queries.count, 1, [&](int64_t begin, int64_t end) {
    Candidates<T> candidates(width, search.wanted(), width);
    PanelSearch<T> panels(exact, candidates);
    for (int64_t q = begin; q < end; ++q) {
      candidates.start_at(q * width);
      panels.start(q);
      for (int64_t p = 0; p < points.count; ++p) panels.compare(q, p);
      panels.finish(q);
    }
    finish_streaming();
  });
  return !exact.gives_up();
}
