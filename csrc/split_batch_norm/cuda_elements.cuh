// The elementwise steps of split_batch_norm on the GPU, and their factors for each split and channel.
#pragma once

#include <cmath>

#include "split_batch_norm/cuda_kernel.cuh"

namespace paper_layers {
namespace {

// Weights or biases, or their gradients, of some splits: a row for each, of A or of another dtype.
template <typename Pointer>
struct ParameterRows {
  Pointer rows[kSplits];
  ScalarType dtype;
  int64_t channels;

  C10_DEVICE explicit operator bool() const { return rows[0]; }
};

template <typename A>
C10_DEVICE double parameter_at(const ParameterRows<const void*>& from, int64_t at, double otherwise) {
  if (!from) return otherwise;
  const int64_t split = at / from.channels, channel = at - split * from.channels;
  const void* row = from.rows[split];
  if (from.dtype == ScalarType::Half) return double(static_cast<const torch::headeronly::Half*>(row)[channel]);
  if (from.dtype == ScalarType::BFloat16) return double(static_cast<const torch::headeronly::BFloat16*>(row)[channel]);
  return double(static_cast<const A*>(row)[channel]);
}

template <typename A>
C10_DEVICE void set_parameter(const ParameterRows<void*>& to, int64_t at, double value) {
  if (!to) return;
  const int64_t split = at / to.channels, channel = at - split * to.channels;
  void* row = to.rows[split];
  if (to.dtype == ScalarType::Half) {
    static_cast<torch::headeronly::Half*>(row)[channel] = static_cast<torch::headeronly::Half>(static_cast<A>(value));
  } else if (to.dtype == ScalarType::BFloat16) {
    static_cast<torch::headeronly::BFloat16*>(row)[channel] =
        static_cast<torch::headeronly::BFloat16>(static_cast<A>(value));
  } else {
    static_cast<A*>(row)[channel] = static_cast<A>(value);
  }
}

// For each split and channel: y = (x - center) scale + shift.
template <typename A>
struct Normalization {
  ParameterRows<const void*> weight, bias;  // or empty
  const A *mean, *var;
  A eps;
  A *scale, *shift;

  // A float32 mean of 1e4 is off by 1e-3 of a deviation of 1: what its rounding leaves goes into the shift.
  C10_DEVICE void set(int64_t at, double exact_mean) const {
    const double of_x = parameter_at<A>(weight, at, 1.0) / std::sqrt(double(var[at]) + double(eps));
    scale[at] = static_cast<A>(of_x);
    shift[at] = static_cast<A>(parameter_at<A>(bias, at, 0.0) - (exact_mean - double(mean[at])) * of_x);
  }
  C10_DEVICE void operator()(int64_t at) const { set(at, double(mean[at])); }
};

// Mean and variance from a split's moments, which are relative to its first value, and what the output takes.
template <typename T, typename E>
struct FinishMoments {
  using A = Accumulator<T>;

  Splits splits;
  E elements;
  const T* input;
  A *mean, *var;
  Normalization<A> normalization;  // Without scale: statistics only.

  C10_DEVICE void operator()(int64_t at, const Moments<double>& moments) const {
    const int64_t split = at / elements.channels, channel = at - split * elements.channels;
    const int64_t image = splits.images[split] * int64_t(elements.run) * elements.runs * E::V;
    const int64_t first = image + channel * (E::rows ? 1 : int64_t(elements.run) * E::V);
    const double exact_mean = moments.count > 0 ? double(A(input[first])) + moments.mean : 0.0;
    mean[at] = static_cast<A>(exact_mean);
    var[at] = static_cast<A>(moments.count > 0 ? moments.squares / moments.count : 0.0);
    if (normalization.scale) normalization.set(at, exact_mean);
  }
};

template <typename T, typename E>
struct Normalize {
  using A = Accumulator<T>;

  Splits splits;
  E elements;
  const Pack<T, E::V>* input;
  const A *center, *scale, *shift;
  Pack<T, E::V>* output;

  C10_DEVICE void operator()(typename E::Index pack) const {
    const auto at = elements.values_at(splits, pack);
    const auto c = values_of_pack<E>(center, at), a = values_of_pack<E>(scale, at), b = values_of_pack<E>(shift, at);
    const Pack<T, E::V> x = input[pack];
    Pack<T, E::V> y;
    for (int v = 0; v < E::V; ++v) y[v] = static_cast<T>((A(x[v]) - c[v]) * a[v] + b[v]);
    output[pack] = y;
  }
};

// For each split and channel: the input's gradient is of_grad grad + of_input (x - center) + shift.
template <typename A>
struct Pullback {
  ParameterRows<const void*> weight;  // or empty
  const A* var;
  const A *mean_product, *mean_grad;  // of the op whose means are given
  A eps;
  A *of_grad, *of_input, *shift;

  C10_DEVICE void set(int64_t at, double product, double grad) const {
    const double invstd = 1.0 / std::sqrt(double(var[at]) + double(eps));
    const double scale = parameter_at<A>(weight, at, 1.0) * invstd;
    of_grad[at] = static_cast<A>(scale);
    of_input[at] = static_cast<A>(-scale * invstd * product);
    shift[at] = static_cast<A>(-scale * grad);
  }
  C10_DEVICE void operator()(int64_t at) const { set(at, double(mean_product[at]), double(mean_grad[at])); }
};

template <typename A>
struct FinishSums {
  Splits splits;
  int64_t channels, pixels;
  ParameterRows<void*> products, sums;  // or empty
  Pullback<A> pullback;  // Without of_grad: sums only.

  C10_DEVICE void operator()(int64_t at, const Sums<double>& of) const {
    const int64_t split = at / channels;
    const int64_t values = (splits.images[split + 1] - splits.images[split]) * pixels;
    const double count = double(values > 0 ? values : 1);
    const double product = of.product / std::sqrt(double(pullback.var[at]) + double(pullback.eps));
    set_parameter<A>(products, at, product);
    set_parameter<A>(sums, at, of.grad);
    if (pullback.of_grad) pullback.set(at, product / count, of.grad / count);
  }
};

template <typename T, typename E>
struct GradInput {
  using A = Accumulator<T>;

  Splits splits;
  E elements;
  const Pack<T, E::V>*grad, *input;
  const A *center, *of_grad, *of_input, *shift;
  Pack<T, E::V>* output;

  C10_DEVICE void operator()(typename E::Index pack) const {
    const auto at = elements.values_at(splits, pack);
    const auto c = values_of_pack<E>(center, at), a = values_of_pack<E>(of_grad, at),
               b = values_of_pack<E>(of_input, at), d = values_of_pack<E>(shift, at);
    const Pack<T, E::V> g = grad[pack], x = input[pack];
    Pack<T, E::V> result;
    for (int v = 0; v < E::V; ++v) result[v] = static_cast<T>(A(g[v]) * a[v] + ((A(x[v]) - c[v]) * b[v] + d[v]));
    output[pack] = result;
  }
};

}  // namespace
}  // namespace paper_layers
