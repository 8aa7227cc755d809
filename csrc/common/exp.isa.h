// The exponential function of vectors, compiled once for each instruction set.

template <typename T>
struct ExpTraits;
template <>
struct ExpTraits<float> {
  static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
  static constexpr float round = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  static constexpr int bias = 127, mantissa = 23;
  // e^r = 1 + r + r^2 p(r) on |r| <= ln(2)/2, relative error 4.4e-9
  static constexpr float p[] = {1,
                                1,
                                0.4999999403953552f,
                                0.1666651964187622f,
                                0.04166839271783829f,
                                0.008368780836462975f,
                                0.001381446490995586f};
};
template <>
struct ExpTraits<double> {
  static constexpr double ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
  static constexpr double round = 0x1.8p52;
  static constexpr int bias = 1023, mantissa = 52;
  // Taylor: the first term left out is 4e-18 of the whole.
  static constexpr double p[] = {1,           1,            1. / 2,        1. / 6,         1. / 24,
                                 1. / 120,    1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                                 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800.};
};

// e^x 2^-exponent where that is a normal number and zero below, for x at most (exponent + 1) ln 2;
// NaN for NaN and +inf. Scaling by a power of two keeps the precision of x whatever the exponent.
template <typename T>
struct ScaledExp {
  using V = Vec<T>;
  using E = ExpTraits<T>;
  T zero, round;

  // At x = zero and below, the biased exponent of the result is zero.
  explicit PAPER_LAYERS_INLINE ScaledExp(int64_t exponent)
      : zero(static_cast<T>((exponent - E::bias) * 0.6931471805599453)), round(E::round + static_cast<T>(E::bias - exponent)) {}

  PAPER_LAYERS_INLINE V operator()(V x) const {
    const V clamped = max_or_second(V(zero), x);  // keeps NaN
    // The low bits of `rounding` are the result's biased exponent.
    const V rounding = multiply_add(clamped, V(T(1.4426950408889634)), V(round));
    const V n = rounding - V(round);
    V r = multiply_add(n, V(-E::ln2_high), clamped);
    r = multiply_add(n, V(-E::ln2_low), r);
    constexpr int degree = sizeof(E::p) / sizeof(T) - 1;
    V poly = V(E::p[degree]);
#pragma GCC unroll 16
    for (int i = degree - 1; i >= 0; --i) poly = multiply_add(poly, r, V(E::p[i]));
    using Bits = typename V::BitLanes;
    return poly * V(typename V::Lanes(Bits(rounding.lanes) << E::mantissa));
  }
};
