// SoftTriple as a whole on the CPU: a thread takes some classes at a time through all steps, matrix products included,
// while its caches hold them. Which classes go together depends on the centers alone, so results do not depend on the
// threads.
#pragma once

#include <atomic>

#include "common/huge_pages.h"
#include "common/products.h"

namespace paper_layers {
namespace {

// The classes at a time: enough rows of centers to be worth packing what they are multiplied by, few enough to stay in
// a core's own cache, and work for several threads.
int64_t classes_at_a_time(const SoftTripleLoss& loss) {
  if (loss.chunk_size > 0) return std::min(loss.chunk_size, std::max<int64_t>(1, loss.classes));
  const int64_t least = 128 / loss.centers + 1, most = std::max(least, 384 / loss.centers);
  const int64_t size = std::clamp((loss.classes + 3) / 4, least, most);
  const int64_t parts = std::max<int64_t>(1, (loss.classes + size - 1) / size);
  return std::max<int64_t>(1, (loss.classes + parts - 1) / parts);  // evenly
}

// A matrix in memory of ours.
template <typename A>
Tensor matrix(const A* data, int64_t rows, int64_t columns, bool transposed = false) {
  constexpr ScalarType dtype = std::is_same_v<A, float> ? ScalarType::Float : ScalarType::Double;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(const_cast<A*>(data), {rows, columns},
                                  {transposed ? 1 : columns, transposed ? rows : 1}, cpu, dtype);
}

// Elements in whole cache lines: memory of all workers is aligned alike, as products may depend on it.
int64_t in_lines(int64_t elements) { return (elements + 15) / 16 * 16; }

// Memory of ours, allocated where torch's profiler sees it: not by threads of the pool.
Tensor memory(const SoftTripleLoss& loss, const Tensor& like, IntHeaderOnlyArrayRef shape) {
  return new_empty(like, shape, loss.dtype);
}

// Parts of the classes. Groups of them, in order, have a sum of the embeddings' gradients each.
struct Parts {
  static constexpr int64_t kGroups = 16;
  int64_t size, count, groups, grain, threads;

  explicit Parts(const SoftTripleLoss& loss)
      : size(classes_at_a_time(loss)),
        count((loss.classes + size - 1) / size),
        groups(std::min(count, kGroups)),
        grain(grain_size(1 << 20, {size, loss.centers, loss.rows, loss.channels})),
        threads(std::min<int64_t>(std::max<int64_t>(groups, 2), torch::stable::get_num_threads())) {}

  // True if there is work for one thread alone.
  bool small() const { return grain > groups; }
  void multiply(const Tensor& a, const Tensor& b, const Tensor& to, bool add = false) const {
    if (small()) add_small_product(to, a, b, add, 1, to);
    else add_product(to, a, b, add, 1, to);
  }

  int64_t first_of(int64_t group) const { return group * count / groups; }
};

// The embeddings as unit vectors.
template <typename A>
struct Unit {
  Tensor lengths, rows;
  A *inverse, *data;

  Unit(const SoftTripleLoss& loss, const Tensor& embeddings)
      : lengths(memory(loss, embeddings, {loss.rows})),
        rows(memory(loss, embeddings, {loss.rows, loss.channels})),
        inverse(lengths.mutable_data_ptr<A>()),
        data(rows.mutable_data_ptr<A>()) {
    const Tensor wide = to_contiguous(to_dtype(embeddings, loss.dtype));
    PAPER_LAYERS_DISPATCH(unit_vectors(loss.rows, loss.channels, wide.const_data_ptr<A>(), inverse, data));
  }
};

// A thread's work: some classes, their centers (classes K, d) and the scores (classes K, B).
template <typename A>
struct Part {
  int64_t worker, group, first, count;
  const A* centers;
  A* scores;
};

// Calls body(part) for all parts, for the parts of a group in turn. Workers are below parts.threads.
template <typename A, typename Body>
void for_each_part(const SoftTripleLoss& loss, const Parts& parts, const Tensor& centers, const Unit<A>& unit,
                   const Body& body) {
  if (parts.count == 0) return;
  const int64_t size = parts.size, all_scores = in_lines(checked_product({size, loss.centers, loss.rows}));
  const Tensor buffer = memory(loss, unit.rows, {parts.threads, all_scores});
  A* const buffers = buffer.mutable_data_ptr<A>();
  std::atomic<int64_t> workers = 0;
  const auto work = [&](int64_t begin, int64_t end) {
    const int64_t worker = workers++;
    A* const scores = buffers + worker * all_scores;
    const Tensor columns = matrix(unit.data, loss.channels, loss.rows, true);
    for (int64_t group = begin; group < end; ++group) {
      for (int64_t p = parts.first_of(group); p < parts.first_of(group + 1); ++p) {
        const int64_t first = p * size, count = std::min(size, loss.classes - first), rows = count * loss.centers;
        const Tensor wide = to_contiguous(to_dtype(narrow(centers, 0, first, count), loss.dtype));
        const A* const part = wide.const_data_ptr<A>();
        parts.multiply(matrix(part, rows, loss.channels), columns, matrix(scores, rows, loss.rows));
        body(Part<A>{worker, group, first, count, part, scores});
      }
    }
  };
  if (parts.small()) work(0, parts.groups);
  else in_parallel_region(parts.groups, parts.grain, work);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> soft_triple(const Tensor& embeddings, const Tensor& centers,
                                                               Tensor labels, double la, double gamma, double margin,
                                                               bool distances, int64_t chunk_size) {
  const SoftTripleLoss loss = soft_triple_loss_problem(embeddings, centers, labels, chunk_size);
  make_contiguous(labels);
  const auto make = [&](IntHeaderOnlyArrayRef shape) { return memory(loss, embeddings, shape); };
  const Parts parts(loss);
  const int64_t K = loss.centers, width = (loss.rows + 15) / 16 * 16;  // whole vectors
  Tensor logsumexp = make({loss.rows}), target = make({loss.rows}), distance = make({});
  Tensor inverse = make({loss.classes, K}), pull = distances ? make({loss.classes, K, K}) : make({0});
  dispatch_accumulator(loss.dtype, [&](auto element) {
    using A = decltype(element);
    const Unit<A> unit(loss, embeddings);
    const SoftTripleFactors<A> factors(la, gamma, margin);
    const Tensor logsumexps = new_zeros(logsumexp, {parts.count, width});
    A* const of_parts = logsumexps.mutable_data_ptr<A>();
    std::vector<A> sums(parts.count);
    A *const own = target.mutable_data_ptr<A>(), *const lengths = inverse.mutable_data_ptr<A>();
    A* const pulls = distances ? pull.mutable_data_ptr<A>() : nullptr;
    std::fill_n(own, loss.rows, A(0));
    for_each_part<A>(loss, parts, centers, unit, [&](const Part<A>& part) {
      const int64_t first = part.first;
      A *const inverses = lengths + first * K, *const to = of_parts + first / parts.size * width;
      const SoftTripleCenters of_centers{part.count, K, loss.channels, distances};
      const SoftTripleChunk chunk{part.count, K, loss.rows};
      PAPER_LAYERS_DISPATCH(soft_triple_centers(of_centers, part.centers, inverses, sums.data() + first / parts.size,
                                                distances ? pulls + first * K * K : nullptr));
      PAPER_LAYERS_DISPATCH(soft_triple_chunk_forward<A>(chunk, factors, part.scores, inverses,
                                                         labels.const_data_ptr<int64_t>(), first, to, own));
    });
    PAPER_LAYERS_DISPATCH(log_sum_exp(of_parts, parts.count, width, loss.rows, logsumexp.mutable_data_ptr<A>()));
    *distance.mutable_data_ptr<A>() = static_cast<A>(std::accumulate(sums.begin(), sums.end(), 0.0));
  });
  return {logsumexp, target, distance, inverse, pull};
}

// The gradients of embeddings and centers, where weigh(part, inverse lengths, projections) makes a part's scores their
// gradients and writes the sums of gradients times cosines.
template <typename A, typename Weigh>
std::tuple<Tensor, Tensor> pull_back(const SoftTripleLoss& loss, const Tensor& embeddings, const Tensor& centers,
                                     const Tensor& inverse, const Tensor& pull, A grad_distance, const Weigh& weigh) {
  const Parts parts(loss);
  const int64_t K = loss.centers, B = loss.rows, d = loss.channels;
  const bool distances = pull.numel() > 0;
  Tensor grad_embeddings = new_zeros(embeddings, embeddings.sizes(), loss.dtype);
  Tensor grad_centers = new_empty(centers, {loss.classes, K, d});
  if (parts.count == 0) return {to_dtype(grad_embeddings, embeddings.scalar_type()), grad_centers};
  use_huge_pages(grad_centers);
  const Unit<A> unit(loss, embeddings);
  const bool direct = grad_centers.scalar_type() == loss.dtype;
  const Tensor share = memory(loss, embeddings, {parts.groups, B, d});
  const Tensor projection = memory(loss, embeddings, {parts.threads, parts.size * K});
  const int64_t all_grads = in_lines(parts.size * K * d);
  const Tensor wide_grad = memory(loss, embeddings, {direct ? 0 : parts.threads, all_grads});
  A *const shares = share.mutable_data_ptr<A>(), *const projections = projection.mutable_data_ptr<A>();
  for_each_part<A>(loss, parts, centers, unit, [&](const Part<A>& part) {
    const int64_t first = part.first, rows = part.count * K;
    A* const projected = projections + part.worker * parts.size * K;
    const A* const inverses = inverse.const_data_ptr<A>() + first * K;
    const A* const pulls = distances ? pull.const_data_ptr<A>() + first * K * K : nullptr;
    A* const grad = direct ? grad_centers.mutable_data_ptr<A>() + first * K * d
                           : wide_grad.mutable_data_ptr<A>() + part.worker * all_grads;
    weigh(part, inverses, projected);
    const bool more = first > parts.first_of(part.group) * parts.size;
    parts.multiply(matrix(part.scores, B, rows, true), matrix(part.centers, rows, d),
                   matrix(shares + part.group * B * d, B, d), more);
    parts.multiply(matrix(part.scores, rows, B), unit.rows, matrix(grad, rows, d));
    PAPER_LAYERS_DISPATCH(soft_triple_add_centers<A>({part.count, K, d, distances}, part.centers, inverses, projected,
                                                     pulls, grad_distance, grad));
    if (direct) return;
    Tensor to = narrow(grad_centers, 0, first, part.count);
    torch::stable::copy_(to, torch::stable::from_blob(grad, to.sizes(), to.strides(), to.device(), loss.dtype));
  });
  A* const grad = grad_embeddings.mutable_data_ptr<A>();
  parallel_for(0, B, 1 + 32768 / (1 + parts.groups * d), [&](int64_t begin, int64_t end) {
    for (int64_t group = 0; group < parts.groups; ++group) {
      for (int64_t i = begin * d; i < end * d; ++i) grad[i] += shares[group * B * d + i];
    }
  });
  PAPER_LAYERS_DISPATCH(unit_vectors_backward(B, d, unit.data, unit.inverse, grad));
  return {to_dtype(grad_embeddings, embeddings.scalar_type()), grad_centers};
}

std::tuple<Tensor, Tensor> soft_triple_backward(Tensor grad_logsumexp, Tensor grad_target, const Tensor& grad_distance,
                                                const Tensor& embeddings, const Tensor& centers, Tensor labels,
                                                Tensor logsumexp, Tensor inverse, Tensor pull, double la, double gamma,
                                                double margin, int64_t chunk_size) {
  const SoftTripleLoss loss = soft_triple_loss_problem(embeddings, centers, labels, chunk_size);
  check_loss_backward(loss, grad_logsumexp, grad_target, grad_distance, logsumexp, inverse, pull);
  make_contiguous(grad_logsumexp, grad_target, labels, logsumexp, inverse, pull);
  std::tuple<Tensor, Tensor> result;
  dispatch_accumulator(loss.dtype, [&](auto element) {
    using A = decltype(element);
    const SoftTripleFactors<A> factors(la, gamma, margin);
    const auto weigh = [&](const Part<A>& part, const A* inverses, A* projected) {
      const SoftTripleChunk chunk{part.count, loss.centers, loss.rows};
      PAPER_LAYERS_DISPATCH(soft_triple_chunk_backward<A>(
          chunk, factors, part.scores, inverses, labels.const_data_ptr<int64_t>(), part.first,
          logsumexp.const_data_ptr<A>(), grad_logsumexp.const_data_ptr<A>(), grad_target.const_data_ptr<A>(),
          projected));
    };
    result = pull_back<A>(loss, embeddings, centers, inverse, pull, *grad_distance.const_data_ptr<A>(), weigh);
  });
  return result;
}

std::tuple<Tensor, Tensor> soft_triple_logits(const Tensor& embeddings, const Tensor& centers, double la, double gamma,
                                              int64_t chunk_size) {
  const SoftTripleLoss loss = soft_triple_problem(embeddings, centers, chunk_size);
  const Parts parts(loss);
  const int64_t K = loss.centers, B = loss.rows;
  Tensor logits = memory(loss, embeddings, {B, loss.classes}), inverse = memory(loss, embeddings, {loss.classes, K});
  dispatch_accumulator(loss.dtype, [&](auto element) {
    using A = decltype(element);
    const Unit<A> unit(loss, embeddings);
    const Tensor buffer = memory(loss, embeddings, {parts.threads, parts.size * B});
    A *const to = logits.mutable_data_ptr<A>(), *const lengths = inverse.mutable_data_ptr<A>();
    for_each_part<A>(loss, parts, centers, unit, [&](const Part<A>& part) {
      A *const inverses = lengths + part.first * K, distance;
      A* const similarity = buffer.mutable_data_ptr<A>() + part.worker * parts.size * B;
      PAPER_LAYERS_DISPATCH(
          soft_triple_centers<A>({part.count, K, loss.channels, false}, part.centers, inverses, &distance, nullptr));
      PAPER_LAYERS_DISPATCH(soft_triple_similarity<A>({part.count, K, B}, static_cast<A>(1 / gamma), part.scores,
                                                      inverses, similarity));
      for (int64_t i = 0; i < B; ++i) {
        A* const row = to + i * loss.classes + part.first;
        for (int64_t c = 0; c < part.count; ++c) row[c] = similarity[c * B + i] * static_cast<A>(la);
      }
    });
  });
  return {logits, inverse};
}

std::tuple<Tensor, Tensor> soft_triple_logits_backward(Tensor grad, const Tensor& embeddings, const Tensor& centers,
                                                       Tensor inverse, double la, double gamma, int64_t chunk_size) {
  const SoftTripleLoss loss = soft_triple_problem(embeddings, centers, chunk_size);
  check_logits_backward(loss, grad, inverse);
  make_contiguous(grad, inverse);
  const Tensor no_pull = memory(loss, embeddings, {0});
  const Parts parts(loss);
  const int64_t B = loss.rows;
  std::tuple<Tensor, Tensor> result;
  dispatch_accumulator(loss.dtype, [&](auto element) {
    using A = decltype(element);
    const Tensor buffer = memory(loss, embeddings, {parts.threads, parts.size * B});
    const auto weigh = [&](const Part<A>& part, const A* inverses, A* projected) {
      A* const of_similarity = buffer.mutable_data_ptr<A>() + part.worker * parts.size * B;
      for (int64_t i = 0; i < B; ++i) {
        const A* const row = grad.const_data_ptr<A>() + i * loss.classes + part.first;
        for (int64_t c = 0; c < part.count; ++c) of_similarity[c * B + i] = row[c] * static_cast<A>(la);
      }
      PAPER_LAYERS_DISPATCH(soft_triple_similarity_backward<A>({part.count, loss.centers, B},
                                                               static_cast<A>(1 / gamma), part.scores, inverses,
                                                               of_similarity, projected));
    };
    result = pull_back<A>(loss, embeddings, centers, inverse, no_pull, A(0), weigh);
  });
  return result;
}

}  // namespace
}  // namespace paper_layers
