// SoftTriple as a whole on the CPU: a thread takes some classes at a time through all steps, matrix products included,
// while its caches hold them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <map>
#include <mutex>
#include <type_traits>

#include "common/huge_pages.h"

namespace paper_layers {
namespace {

// Calls function with an element of the dtype.
template <typename Function>
void with_dtype(ScalarType dtype, Function function) {
  THO_DISPATCH_V2(dtype, "soft_triple", AT_WRAP([&] { function(scalar_t{}); }), ScalarType::Float, ScalarType::Double);
}

Tensor empty(const Tensor& like, std::vector<int64_t> shape) { return torch::stable::new_empty(like, shape); }
Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

// The classes at a time, from shapes alone: so many that multiplying by the embeddings is worth their packing, and few
// enough to stay in a core's own cache.
int64_t classes_at_a_time(const SoftTripleLoss& loss) {
  if (loss.chunk_size > 0) return std::min(loss.chunk_size, std::max<int64_t>(1, loss.classes));
  const int64_t size = std::max<int64_t>(1, std::clamp<int64_t>(2 * loss.rows, 256, 512) / loss.centers);
  const int64_t parts = (loss.classes + size - 1) / size;
  if (parts <= 1) return size;
  const int64_t even = (parts + 3) / 4 * 4;  // as much for each of two or four threads
  return (loss.classes + even - 1) / even;
}

// A matrix in memory of ours. It is none that autograd knows.
template <typename A>
Tensor matrix(const A* data, int64_t rows, int64_t columns, bool transposed = false) {
  constexpr ScalarType dtype = std::is_same_v<A, float> ? ScalarType::Float : ScalarType::Double;
  const std::vector<int64_t> shape = {rows, columns}, strides = {transposed ? 1 : columns, transposed ? rows : 1};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(const_cast<A*>(data), shape, strides, cpu, dtype);
}

// These go past the dispatcher: threads of the pool do not know that autograd and autocast are off.
void multiply(const Tensor& a, const Tensor& b, const Tensor& to) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(to.get(), a.get(), b.get()));
}
void add_product(const Tensor& a, const Tensor& b, const Tensor& to) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(to.get(), to.get(), a.get(), b.get(), 1, 1));
}

// Classes [first, first + count) of centers, or of their gradients.
Tensor part_of(const Tensor& centers, int64_t first, int64_t count) {
  const std::vector<int64_t> shape = {count, centers.size(1), centers.size(2)};
  return torch::stable::from_blob(centers.data_ptr(), shape, centers.strides(), centers.device(),
                                  centers.scalar_type(), first * centers.stride(0));
}

// Memory of ours, allocated where torch's profiler sees it: not by threads of the pool.
Tensor memory(const SoftTripleLoss& loss, const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, loss.dtype);
}

// Parts of the classes, and how many threads at most work on them.
struct Parts {
  int64_t size, count, threads;

  explicit Parts(const SoftTripleLoss& loss)
      : size(classes_at_a_time(loss)),
        count((loss.classes + size - 1) / size),
        threads(std::min<int64_t>(count, torch::stable::get_num_threads())) {}
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
    const Tensor wide = dense(torch::stable::to(embeddings, loss.dtype));
    PAPER_LAYERS_DISPATCH(unit_vectors(loss.rows, loss.channels, wide.const_data_ptr<A>(), inverse, data));
  }
};

// Calls body(worker, first class, classes, their centers, their scores) for all parts. Returned are the workers, each
// below parts.threads, by their first parts.
template <typename A, typename Body>
std::map<int64_t, int64_t> for_each_part(const SoftTripleLoss& loss, const Parts& parts, const Tensor& centers,
                                         const Unit<A>& unit, const Body& body) {
  if (parts.count == 0) return {};
  const int64_t size = parts.size, all_scores = checked_product({size, loss.centers, loss.rows});
  const int64_t grain = grain_size(1 << 20, {all_scores, loss.channels});
  const Tensor buffer = memory(loss, unit.rows, {parts.threads, all_scores});
  A* const buffers = buffer.mutable_data_ptr<A>();
  std::mutex mutex;
  std::map<int64_t, int64_t> workers;
  parallel_for(0, parts.count, grain, [&](int64_t begin, int64_t end) {
    int64_t worker;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      worker = workers.size();
      workers[begin] = worker;
    }
    A* const scores = buffers + worker * all_scores;
    const Tensor columns = matrix(unit.data, loss.channels, loss.rows, true);
    for (int64_t first = begin * size; first < std::min(end * size, loss.classes); first += size) {
      const int64_t count = std::min(size, loss.classes - first), rows = count * loss.centers;
      const Tensor part = dense(torch::stable::to(part_of(centers, first, count), loss.dtype));
      multiply(matrix(part.const_data_ptr<A>(), rows, loss.channels), columns, matrix(scores, rows, loss.rows));
      body(worker, first, count, part.const_data_ptr<A>(), scores);
    }
  });
  return workers;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> soft_triple(const Tensor& embeddings, const Tensor& centers,
                                                               const Tensor& any_labels, double la, double gamma,
                                                               double margin, bool distances, int64_t chunk_size) {
  const SoftTripleLoss loss = soft_triple_loss_problem(embeddings, centers, any_labels, chunk_size);
  const auto make = [&](std::vector<int64_t> shape) { return memory(loss, embeddings, shape); };
  const Parts parts(loss);
  const int64_t K = loss.centers, width = (loss.rows + 15) / 16 * 16;  // whole vectors
  const Tensor labels = dense(any_labels);
  Tensor logsumexp = make({loss.rows}), target = make({loss.rows}), distance = make({});
  Tensor inverse = make({loss.classes, K}), pull = distances ? make({loss.classes, K, K}) : make({0});
  with_dtype(loss.dtype, [&](auto element) {
    using A = decltype(element);
    const Unit<A> unit(loss, embeddings);
    const SoftTripleFactors<A> factors(la, gamma, margin);
    const Tensor logsumexps = torch::stable::new_zeros(logsumexp, {parts.count, width});
    A* const of_parts = logsumexps.mutable_data_ptr<A>();
    std::vector<A> sums(parts.count);
    A *const own = target.mutable_data_ptr<A>(), *const lengths = inverse.mutable_data_ptr<A>();
    A* const pulls = distances ? pull.mutable_data_ptr<A>() : nullptr;
    std::fill_n(own, loss.rows, A(0));
    const auto body = [&](int64_t, int64_t first, int64_t count, const A* part, const A* scores) {
      A *const inverses = lengths + first * K, *const to = of_parts + first / parts.size * width;
      const SoftTripleCenters of_centers{count, K, loss.channels, distances};
      const SoftTripleChunk chunk{count, K, loss.rows};
      PAPER_LAYERS_DISPATCH(soft_triple_centers(of_centers, part, inverses, sums.data() + first / parts.size,
                                                distances ? pulls + first * K * K : nullptr));
      PAPER_LAYERS_DISPATCH(soft_triple_chunk_forward(chunk, factors, scores, inverses,
                                                      labels.const_data_ptr<int64_t>(), first, to, own));
    };
    for_each_part<A>(loss, parts, centers, unit, body);
    PAPER_LAYERS_DISPATCH(log_sum_exp(of_parts, parts.count, width, loss.rows, logsumexp.mutable_data_ptr<A>()));
    *distance.mutable_data_ptr<A>() = static_cast<A>(std::accumulate(sums.begin(), sums.end(), 0.0));
  });
  return {logsumexp, target, distance, inverse, pull};
}

std::tuple<Tensor, Tensor> soft_triple_backward(const Tensor& any_grad_logsumexp, const Tensor& any_grad_target,
                                                const Tensor& grad_distance, const Tensor& embeddings,
                                                const Tensor& centers, const Tensor& any_labels,
                                                const Tensor& any_logsumexp, const Tensor& any_inverse,
                                                const Tensor& any_pull, double la, double gamma, double margin,
                                                int64_t chunk_size) {
  const SoftTripleLoss loss = soft_triple_loss_problem(embeddings, centers, any_labels, chunk_size);
  const bool distances = any_pull.numel() > 0;
  check_loss_backward(loss, any_grad_logsumexp, any_grad_target, grad_distance, any_logsumexp, any_inverse, any_pull);
  const Tensor grad_logsumexp = dense(any_grad_logsumexp), grad_target = dense(any_grad_target),
               labels = dense(any_labels), logsumexp = dense(any_logsumexp), inverse = dense(any_inverse),
               pull = dense(any_pull);
  const Parts parts(loss);
  const int64_t K = loss.centers, B = loss.rows, d = loss.channels;
  Tensor grad_embeddings = torch::stable::new_zeros(embeddings, embeddings.sizes(), loss.dtype);
  Tensor grad_centers = empty(centers, {loss.classes, K, d});
  if (parts.count == 0) return {torch::stable::to(grad_embeddings, embeddings.scalar_type()), grad_centers};
  use_huge_pages(grad_centers);
  with_dtype(loss.dtype, [&](auto element) {
    using A = decltype(element);
    const Unit<A> unit(loss, embeddings);
    const SoftTripleFactors<A> factors(la, gamma, margin);
    const bool direct = grad_centers.scalar_type() == loss.dtype;
    // For each worker: its share of the embeddings' gradient, and what its classes take.
    const Tensor share = torch::stable::new_zeros(grad_embeddings, {parts.threads, B, d});
    const Tensor projection = memory(loss, embeddings, {parts.threads, parts.size * K});
    const Tensor wide_grad = memory(loss, embeddings, {direct ? 0 : parts.threads, parts.size * K * d});
    A *const shares = share.mutable_data_ptr<A>(), *const projections = projection.mutable_data_ptr<A>();
    const auto body = [&](int64_t worker, int64_t first, int64_t count, const A* part, A* scores) {
      A* const projected = projections + worker * parts.size * K;
      const A* const inverses = inverse.const_data_ptr<A>() + first * K;
      const A* const pulls = distances ? pull.const_data_ptr<A>() + first * K * K : nullptr;
      A* const grad = direct ? grad_centers.mutable_data_ptr<A>() + first * K * d
                             : wide_grad.mutable_data_ptr<A>() + worker * parts.size * K * d;
      const SoftTripleChunk chunk{count, K, B};
      const SoftTripleCenters of_centers{count, K, d, distances};
      PAPER_LAYERS_DISPATCH(soft_triple_chunk_backward(
          chunk, factors, scores, inverses, labels.const_data_ptr<int64_t>(), first, logsumexp.const_data_ptr<A>(),
          grad_logsumexp.const_data_ptr<A>(), grad_target.const_data_ptr<A>(), projected));
      add_product(matrix(scores, B, count * K, true), matrix(part, count * K, d),
                  matrix(shares + worker * B * d, B, d));
      multiply(matrix(scores, count * K, B), unit.rows, matrix(grad, count * K, d));
      PAPER_LAYERS_DISPATCH(soft_triple_add_centers(of_centers, part, inverses, projected, pulls,
                                                    *grad_distance.const_data_ptr<A>(), grad));
      if (direct) return;
      Tensor to = part_of(grad_centers, first, count);
      torch::stable::copy_(to, torch::stable::view(matrix(grad, count * K, d), to.sizes()));
    };
    A* const grad = grad_embeddings.mutable_data_ptr<A>();
    for (const auto& [begin, worker] : for_each_part<A>(loss, parts, centers, unit, body)) {
      for (int64_t i = 0; i < B * d; ++i) grad[i] += shares[worker * B * d + i];
    }
    PAPER_LAYERS_DISPATCH(unit_vectors_backward(B, d, unit.data, unit.inverse, grad));
  });
  return {torch::stable::to(grad_embeddings, embeddings.scalar_type()), grad_centers};
}

}  // namespace
}  // namespace paper_layers
