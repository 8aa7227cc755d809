// Matrix products with bits that do not depend on the number of threads.
//
// Torch's library may sum in another order on several threads. Inside a parallel region it takes one. Products that are
// not worth a region are ours. To be included after the kernels.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/parallel.h"
#include "common/tensors.h"

namespace paper_layers {

// Calls body(begin, end) for all items, inside a parallel region whenever there are several threads.
template <typename Body>
void in_parallel_region(int64_t items, int64_t grain, const Body& body) {
  const int64_t range = std::max<int64_t>(items, 2);  // Torch's parallel_for makes no region for one item.
  parallel_for(0, range, std::min(grain, range - 1), [&](int64_t begin, int64_t end) {
    if (begin < items) body(begin, std::min(end, items));
  });
}

// to = alpha a b + beta self. These go past the dispatcher: threads of the pool do not know that autograd and autocast
// are off.
inline void add_product(const Tensor& self, const Tensor& a, const Tensor& b, double beta, double alpha,
                        const Tensor& to) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(to.get(), self.get(), a.get(), b.get(), beta, alpha));
}

// Indices [first, first + count) of a dimension. Autograd does not know this view.
inline Tensor narrow(const Tensor& tensor, int64_t dim, int64_t first, int64_t count) {
  std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
  shape[dim] = count;
  return torch::stable::from_blob(tensor.data_ptr(), shape, tensor.strides(), tensor.device(), tensor.scalar_type(),
                                  first * tensor.stride(dim));
}

// The same by a kernel of ours, in float or double, where beta is 0 or 1 and `to` is dense.
inline void add_small_product(const Tensor& self, const Tensor& a, const Tensor& b, double beta, double alpha,
                              const Tensor& to) {
  dispatch_accumulator(to.scalar_type(), [&](auto element) {
    using A = decltype(element);
    const auto view = [](const Tensor& matrix) {
      return MatrixView<A>{matrix.const_data_ptr<A>(), matrix.stride(0), matrix.stride(1)};
    };
    PAPER_LAYERS_DISPATCH(multiply_small<A>(view(a), view(b), to.size(0), a.size(1), to.size(1),
                                            static_cast<A>(alpha), beta == 0 ? nullptr : self.const_data_ptr<A>(),
                                            self.dim() == 1 ? 0 : self.stride(0), to.mutable_data_ptr<A>()));
  });
}

// Multiplications that a kernel of ours has done before a parallel region begins.
constexpr double kSmallProduct = 1 << 17;

// The number of shares of a product in rows and columns, by sizes alone. Every share packs its parts of both matrices
// anew: there are few shares, more where this matters less, and they pack as little as they can.
struct Shares {
  int64_t rows = 1, columns = 1;

  Shares(int64_t all_rows, int64_t all_columns, double multiplications) {
    const int64_t least = multiplications < (1 << 22) ? 1 : 2;
    const int64_t count = std::max(least, int64_t(1) << std::max(0, (std::ilogb(multiplications) - 21) / 3));
    while (rows * columns < count) {
      const bool more_rows = all_rows * columns > all_columns * rows;
      (more_rows ? rows : columns) *= 2;
    }
  }
};

// Part `share` of equal parts of a dimension.
inline Tensor part_of(const Tensor& tensor, int64_t dim, int64_t share, int64_t shares) {
  if (shares == 1) return tensor;
  const int64_t size = tensor.size(dim), first = share * size / shares;
  return narrow(tensor, dim, first, (share + 1) * size / shares - first);
}

// to = alpha a b + row, where the row is added to all of `to`, if there is any.
inline void multiply_in_shares(const Tensor& to, const std::optional<Tensor>& row, const Tensor& a, const Tensor& b,
                               double alpha) {
  const double multiplications = static_cast<double>(to.numel()) * static_cast<double>(a.size(1));
  const double beta = row.has_value();
  if (multiplications <= kSmallProduct) return add_small_product(row ? *row : to, a, b, beta, alpha, to);
  const Shares shares(to.size(0), to.size(1), multiplications);
  in_parallel_region(shares.rows * shares.columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      const int64_t i = share / shares.columns, j = share % shares.columns;
      const Tensor part = part_of(part_of(to, 0, i, shares.rows), 1, j, shares.columns);
      const Tensor added = row ? part_of(*row, 0, j, shares.columns) : part;
      add_product(added, part_of(a, 0, i, shares.rows), part_of(b, 1, j, shares.columns), beta, alpha, part);
    }
  });
}

}  // namespace paper_layers
