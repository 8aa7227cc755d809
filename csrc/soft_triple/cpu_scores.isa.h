// Soft-max over the centers, relaxed similarity and log-sum-exp of a chunk's scores. Every center is a row over the
// batch, so all is computed for a vector of the batch at a time, however many centers there are.

// Classes whose logits are kept until their largest is known.
constexpr int64_t kLogitBlock = 16;

// Calls body(start, lanes) for the vectors of the batch, each element once.
template <typename A, typename Body>
PAPER_LAYERS_INLINE void for_each_vector(int64_t rows, Body&& body) {
  int64_t i = 0;
  for (; i + Vec<A>::size <= rows; i += Vec<A>::size) body(i, Full{});
  if (i < rows) body(i, rows - i);
}

// Rows of the batch in scratch, in whole vectors.
template <typename A>
int64_t padded(int64_t rows) {
  return (rows + Vec<A>::size - 1) / Vec<A>::size * Vec<A>::size;
}

template <typename A>
Scratch<A> padded_copy(const A* from, int64_t rows) {
  Scratch<A> result(padded<A>(rows));
  std::copy_n(from, rows, result.begin());
  return result;
}

// The type of class numbers in a vector beside vectors of A.
template <typename A>
using Label = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

// The rows' classes within the chunk, -1 where they are not of it.
template <typename A>
Scratch<Label<A>> labels_of_chunk(const SoftTripleChunk& chunk, const int64_t* labels, int64_t first) {
  Scratch<Label<A>> result(padded<A>(chunk.rows), -1);
  for (int64_t i = 0; i < chunk.rows; ++i) {
    result[i] = static_cast<Label<A>>(class_in_chunk(labels[i], first, chunk.classes));
  }
  return result;
}

// The centers of a class as the batch sees them.
template <typename A>
class Relaxed {
  using V = Vec<A>;

 public:
  Relaxed(const SoftTripleChunk& chunk, A per_gamma)
      : centers_(chunk.centers), rows_(chunk.rows), per_gamma_(per_gamma), weights_(centers_ * V::size) {}

  void select(const A* scores, const A* inverse) {
    scores_ = scores;
    inverse_ = inverse;
  }

  template <typename Lanes>
  PAPER_LAYERS_INLINE V cosine(int64_t k, int64_t i, Lanes lanes) const {
    return load(scores_ + k * rows_ + i, lanes) * V(inverse_[k]);
  }

  // The relaxed similarity of a vector of the batch.
  template <typename Lanes>
  PAPER_LAYERS_INLINE V similarity(int64_t i, Lanes lanes) {
    V largest = cosine(0, i, lanes);
    if (centers_ == 1) return largest;
    for (int64_t k = 1; k < centers_; ++k) largest = max_or_second(cosine(k, i, lanes), largest);
    const ScaledExp<A> exp(0);
    V sum(A(0)), total(A(0));
    for (int64_t k = 0; k < centers_; ++k) {
      const V s = cosine(k, i, lanes), weight = exp((s - largest) * V(per_gamma_));
      store(weights_.data() + k * V::size, weight);
      sum = sum + weight;
      total = multiply_add(weight, s, total);
    }
    sum_ = sum;
    return total / sum;
  }

  // After `similarity`: the gradients of the cosines, from its own. body(k, cosine, gradient)
  template <typename Lanes, typename Body>
  PAPER_LAYERS_INLINE void gradients(int64_t i, Lanes lanes, V similarity, V grad, Body&& body) const {
    if (centers_ == 1) {
      body(0, similarity, grad);
      return;
    }
    const V share = grad / sum_;
    for (int64_t k = 0; k < centers_; ++k) {
      const V s = cosine(k, i, lanes), weight = share * load(weights_.data() + k * V::size);
      body(k, s, weight * multiply_add(s - similarity, V(per_gamma_), V(A(1))));
    }
  }

 private:
  const int64_t centers_, rows_;
  const A per_gamma_;
  const A *scores_ = nullptr, *inverse_ = nullptr;
  Scratch<A> weights_;
  V sum_;
};

// Log-sum-exps over classes, of each row of the batch. A logit of -infinity is none: differences from the largest one
// have to be numbers, so that is finite.
template <typename A>
class LogSumExp {
  using V = Vec<A>;

 public:
  // Starts with none; `partial` is memory for two rows.
  LogSumExp(A* partial, int64_t width) : largest_(partial), sum_(partial + width), width_(width) {
    std::fill_n(largest_, width, std::numeric_limits<A>::lowest());
    std::fill_n(sum_, width, A(0));
  }

  void add(const A* logits, int64_t classes) {
    const ScaledExp<A> exp(0);
    for (int64_t i = 0; i < width_; i += V::size) {
      const V before = load(largest_ + i);
      V largest = before;
      for (int64_t c = 0; c < classes; ++c) largest = max_or_second(load(logits + c * width_ + i), largest);
      V sum = load(sum_ + i) * exp(before - largest);
      for (int64_t c = 0; c < classes; ++c) sum = sum + exp(load(logits + c * width_ + i) - largest);
      store(largest_ + i, largest);
      store(sum_ + i, sum);
    }
  }

 private:
  A *largest_, *sum_;
  const int64_t width_;
};

// Combines partial results in order.
template <typename A>
void combine(const Scratch<A>& partials, int64_t width, int64_t rows, A* to) {
  for (int64_t i = 0; i < rows; ++i) {
    A largest = -std::numeric_limits<A>::infinity(), sum = 0;
    for (size_t p = i; p < partials.size(); p += 2 * width) largest = std::max(largest, partials[p]);
    for (size_t p = i; p < partials.size(); p += 2 * width) {
      sum += std::exp(partials[p] - largest) * partials[p + width];
    }
    to[i] = largest + std::log(sum);
  }
}

// The log-sum-exp of each column of parts (count, width), which are log-sum-exps themselves.
template <typename A>
void log_sum_exp(const A* parts, int64_t count, int64_t width, int64_t rows, A* to) {
  if (count == 0) {
    std::fill_n(to, rows, -std::numeric_limits<A>::infinity());
    return;
  }
  Scratch<A> partial(2 * width);
  LogSumExp<A>(partial.data(), width).add(parts, count);
  combine(partial, width, rows, to);
}

// The log-sum-exp of each row is over its other classes: a sum of all would round off the whole loss of a row that is
// far from them. Writes the target's elements whose labels are in the chunk.
template <typename A>
void soft_triple_chunk_forward(const SoftTripleChunk& chunk, SoftTripleFactors<A> factors, const A* scores,
                               const A* inverse, const int64_t* labels, int64_t first, A* logsumexp, A* target) {
  using V = Vec<A>;
  const int64_t width = padded<A>(chunk.rows), blocks = (chunk.classes + kClassBlock - 1) / kClassBlock;
  const auto own = labels_of_chunk<A>(chunk, labels, first);
  Scratch<A> partials(2 * width * blocks);
  for_each_block(chunk.classes, chunk.scores_per_class(), [&](int64_t begin, int64_t end) {
    Relaxed<A> relaxed(chunk, factors.per_gamma);
    LogSumExp<A> sums(partials.data() + begin / kClassBlock * 2 * width, width);
    Scratch<A> logits(kLogitBlock * width);
    for (int64_t start = begin; start < end; start += kLogitBlock) {
      const int64_t count = std::min(kLogitBlock, end - start);
      for (int64_t c = start; c < start + count; ++c) {
        relaxed.select(scores + c * chunk.scores_per_class(), inverse + c * chunk.centers);
        A* const row = logits.data() + (c - start) * width;
        for_each_vector<A>(chunk.rows, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          store(row + i, relaxed.similarity(i, lanes) * V(factors.la));
        });
      }
      for (int64_t i = 0; i < chunk.rows; ++i) {
        if (own[i] < start || own[i] >= start + count) continue;
        A& logit = logits[(own[i] - start) * width + i];
        target[i] = logit - factors.la_margin;
        logit = -std::numeric_limits<A>::infinity();
      }
      sums.add(logits.data(), count);
    }
  });
  combine(partials, width, chunk.rows, logsumexp);
}

template <typename A>
void soft_triple_similarity(const SoftTripleChunk& chunk, A per_gamma, const A* scores, const A* inverse, A* to) {
  for_each_block(chunk.classes, chunk.scores_per_class(), [&](int64_t begin, int64_t end) {
    Relaxed<A> relaxed(chunk, per_gamma);
    for (int64_t c = begin; c < end; ++c) {
      relaxed.select(scores + c * chunk.scores_per_class(), inverse + c * chunk.centers);
      for_each_vector<A>(chunk.rows, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        store(to + c * chunk.rows + i, relaxed.similarity(i, lanes), lanes);
      });
    }
  });
}

// Replaces scores by their gradients, given the similarities': grad(class, start, lanes, similarity).
template <typename A, typename Gradient>
void replace_by_gradients(const SoftTripleChunk& chunk, A per_gamma, A* scores, const A* inverse, A* projection,
                          const Gradient& gradient) {
  using V = Vec<A>;
  for_each_block(chunk.classes, chunk.scores_per_class(), [&](int64_t begin, int64_t end) {
    Relaxed<A> relaxed(chunk, per_gamma);
    Scratch<A> sums(chunk.centers * V::size);
    for (int64_t c = begin; c < end; ++c) {
      A* const rows = scores + c * chunk.scores_per_class();
      const A* const lengths = inverse + c * chunk.centers;
      relaxed.select(rows, lengths);
      std::fill(sums.begin(), sums.end(), A(0));
      for_each_vector<A>(chunk.rows, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const V similarity = relaxed.similarity(i, lanes), grad = gradient(c, i, lanes, similarity);
        relaxed.gradients(i, lanes, similarity, grad, [&](int64_t k, V s, V g) __attribute__((always_inline)) {
          A* const sum = sums.data() + k * V::size;
          store(sum, multiply_add(g, s, load(sum)));
          store(rows + k * chunk.rows + i, g * V(lengths[k]), lanes);
        });
      });
      for (int64_t k = 0; k < chunk.centers; ++k) {
        projection[c * chunk.centers + k] = total_of(load(sums.data() + k * V::size).lanes);
      }
    }
  });
}

template <typename A>
void soft_triple_chunk_backward(const SoftTripleChunk& chunk, SoftTripleFactors<A> factors, A* scores, const A* inverse,
                                const int64_t* labels, int64_t first, const A* logsumexp, const A* grad_logsumexp,
                                const A* grad_target, A* projection) {
  using V = Vec<A>;
  const auto own = labels_of_chunk<A>(chunk, labels, first);
  const Scratch<A> sums = padded_copy(logsumexp, chunk.rows), grad_sums = padded_copy(grad_logsumexp, chunk.rows),
                   grad_targets = padded_copy(grad_target, chunk.rows);
  const auto gradient = [&](int64_t c, int64_t i, auto, V similarity) __attribute__((always_inline)) {
    const ScaledExp<A> exp(0);
    typename V::BitLanes label;
    std::memcpy(&label, own.data() + i, sizeof(label));
    const auto is_own = label == static_cast<Label<A>>(c) - typename V::BitLanes{};
    V grad = load(grad_sums.data() + i) * exp(similarity * V(factors.la) - load(sums.data() + i));
    if (__builtin_expect(lanes_set(is_own), 0)) {
      grad = V(is_own ? load(grad_targets.data() + i).lanes : grad.lanes);
    }
    return V(factors.la) * grad;
  };
  replace_by_gradients(chunk, factors.per_gamma, scores, inverse, projection, gradient);
}

template <typename A>
void soft_triple_similarity_backward(const SoftTripleChunk& chunk, A per_gamma, A* scores, const A* inverse,
                                     const A* grad, A* projection) {
  const auto gradient = [&](int64_t c, int64_t i, auto lanes, Vec<A>) __attribute__((always_inline)) {
    return load(grad + c * chunk.rows + i, lanes);
  };
  replace_by_gradients(chunk, per_gamma, scores, inverse, projection, gradient);
}
