// The pairs of panels that are compared, and their threads.

// Candidates of all the rows of a cloud may take so much memory; and so much for a row, or they push the points, which
// exact distances need, out of the caches.
constexpr int64_t kCandidateBytes = int64_t{1} << 27, kRowBytes = 8192;
// Elements of panels that stay in the second-level cache while others pass by.
constexpr int64_t kCachedElements = 32768;
// Multiplications that are worth another thread.
constexpr double kThreadWork = 2e6;

// A cloud that searches itself: the products of two panels serve the rows of both. Panels are split in blocks, and
// threads work on pairs of blocks that have none in common.
template <typename T>
class SymmetricSearch {
 public:
  SymmetricSearch(PanelDistances<T>& exact, int64_t threads)
      : exact_(exact),
        panels_(exact.points.count),
        blocks_(blocks(panels_, threads)),
        candidates_(panels_ * width, exact.search.wanted(), width) {}

  static bool fits(const Search<T>& search, int64_t panels) {
    const int64_t row = Candidates<T>::bytes(search.wanted(), width);
    return search.searches_itself() && row <= kRowBytes && panels * width * row <= kCandidateBytes;
  }

  // Phases of run().
  static int64_t phases(int64_t panels, int64_t threads) { return blocks(panels, threads) + 1; }

  // By all threads together.
  void run(Team::Each& each) {
    PanelSearch<T> search(exact_, candidates_);
    each(blocks_, [&](int64_t i) {
      for (int64_t p = block(i).begin; p < block(i).end; ++p) search.start(p);
      compare(search, block(i), block(i));
    });
    // A tournament: in every round each block meets another one; the last stays in its place, the others move on.
    const int64_t moving = blocks_ - 1;
    for (int64_t round = 0; round < moving; ++round) {
      each(blocks_ / 2, [&](int64_t i) {
        const int64_t a = (round + i) % moving, b = i == 0 ? moving : (round + moving - i) % moving;
        compare(search, block(a), block(b));
      });
    }
    each(panels_, [&](int64_t p) { search.finish(p); });
  }

 private:
  static constexpr int64_t width = Panels<T>::width;

  // Twice as many pairs as threads, so that a late thread delays the others by little.
  static int64_t blocks(int64_t panels, int64_t threads) {
    return threads == 1 ? 1 : std::max<int64_t>(1, std::min(4 * threads, panels / 2) / 2 * 2);
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
  const int64_t panels_, blocks_;
  Candidates<T> candidates_;
};

// False where it gave up, because too many points are as near as makes no difference to the scores.
template <typename T>
bool search_panels(const Search<T>& search, Scores scores) {
  constexpr int64_t width = Panels<T>::width;
  const bool self = search.searches_itself(), dense = scores == Scores::products && DenseSearch<T>::fits(search);
  const Frame<T> frame(search, scores);
  Panels<T> points(search, scores, frame, search.point, search.points);
  Panels<T> others(search, scores, frame, search.query, self ? 0 : search.queries);
  Panels<T>& queries = self ? points : others;
  const bool both = dense ? DenseSearch<T>::is_symmetric(search) : SymmetricSearch<T>::fits(search, points.count);
  const double work = static_cast<double>(search.queries) * search.points * (search.channels() + 16);
  const int64_t threads = std::min<double>(search.threads, 1 + work / kThreadWork);
  std::optional<PanelDistances<T>> exact;
  std::optional<SymmetricSearch<T>> symmetric;
  std::unique_ptr<T[]> products;
  Team::run(threads, 4 + SymmetricSearch<T>::phases(points.count, threads), [&](Team::Each each) {
    each(points.count + others.count, [&](int64_t p) {
      if (p < points.count) points.pack(p);
      else others.pack(p - points.count);
    });
    each(1, [&](int64_t) {
      exact.emplace(search, frame, queries, points);
      if (dense && both) products.reset(new T[points.count * width * points.count * width]);
      if (!dense && both) symmetric.emplace(*exact, threads);
    });
    if (!exact) return;  // out of memory
    if (dense) {
      std::unique_ptr<T[]> own(both ? nullptr : new T[width * points.count * width]);
      DenseSearch<T> search(*exact, both ? products.get() : own.get(), both);
      if (both) each(points.count, [&](int64_t p) { search.multiply_both(p); });
      each(queries.count, [&](int64_t p) { search.finish(p); });
    } else if (both) {
      symmetric->run(each);
    } else {
      Candidates<T> candidates(width, search.wanted(), width);
      PanelSearch<T> panels(*exact, candidates);
      each(queries.count, [&](int64_t q) {
        candidates.start_at(q * width);
        panels.start(q);
        for (int64_t p = 0; p < points.count; ++p) panels.compare(q, p);
        panels.finish(q);
      });
    }
    finish_streaming();
  });
  return !exact->gives_up();
}
