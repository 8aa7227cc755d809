// Vectors of float or double in the registers of one instruction set. Included by for_each_isa.h inside
// a namespace for each set, hence without an include guard. Mostly GCC's and Clang's vector
// extensions; intrinsics only where the compilers miss the instruction.

#define PAPER_LAYERS_INLINE inline __attribute__((always_inline))

template <typename T>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float Lanes __attribute__((vector_size(PAPER_LAYERS_VECTOR_BYTES)));
  typedef int32_t BitLanes __attribute__((vector_size(PAPER_LAYERS_VECTOR_BYTES)));
};
template <>
struct LanesOf<double> {
  typedef double Lanes __attribute__((vector_size(PAPER_LAYERS_VECTOR_BYTES)));
  typedef int64_t BitLanes __attribute__((vector_size(PAPER_LAYERS_VECTOR_BYTES)));
};

template <typename T>
struct Vec {
  static constexpr int64_t size = PAPER_LAYERS_VECTOR_BYTES / sizeof(T);
  using Lanes = typename LanesOf<T>::Lanes;
  using BitLanes = typename LanesOf<T>::BitLanes;

  Lanes lanes;

  Vec() = default;
  PAPER_LAYERS_INLINE Vec(Lanes v) : lanes(v) {}
  explicit PAPER_LAYERS_INLINE Vec(T value) : lanes(value - Lanes{}) {}

  friend PAPER_LAYERS_INLINE Vec operator+(Vec a, Vec b) { return a.lanes + b.lanes; }
  friend PAPER_LAYERS_INLINE Vec operator-(Vec a, Vec b) { return a.lanes - b.lanes; }
  friend PAPER_LAYERS_INLINE Vec operator*(Vec a, Vec b) { return a.lanes * b.lanes; }
  friend PAPER_LAYERS_INLINE Vec operator/(Vec a, Vec b) { return a.lanes / b.lanes; }
};

// Completes the types here: the compiler keeps them in memory if it first meets them where templates are instantiated,
// at the end of the file, with another set.
static_assert(sizeof(Vec<float>) == PAPER_LAYERS_VECTOR_BYTES && sizeof(Vec<double>) == PAPER_LAYERS_VECTOR_BYTES);

// a * b + c, fused where the set can
template <typename V>
PAPER_LAYERS_INLINE V multiply_add(V a, V b, V c) {
  return V(a.lanes * b.lanes + c.lanes);
}

// A product that no sum takes into a fused operation: see `rounded_product`.
template <typename V>
PAPER_LAYERS_INLINE V unfused(V product) {
#if PAPER_LAYERS_VECTOR_BYTES == 64
  asm("" : "+v"(product.lanes));
#elif defined(PAPER_LAYERS_X86)
  asm("" : "+x"(product.lanes));
#elif defined(__aarch64__)
  asm("" : "+w"(product.lanes));
#endif
  return product;
}

// The larger of the two, and b where either is NaN.
template <typename V>
PAPER_LAYERS_INLINE V max_or_second(V a, V b) {
#if PAPER_LAYERS_VECTOR_BYTES == 64
  if constexpr (V::size == 16) return V(typename V::Lanes(_mm512_max_ps(__m512(a.lanes), __m512(b.lanes))));
#elif PAPER_LAYERS_VECTOR_BYTES == 32
  if constexpr (V::size == 8) return V(typename V::Lanes(_mm256_max_ps(__m256(a.lanes), __m256(b.lanes))));
#elif defined(PAPER_LAYERS_X86)
  if constexpr (V::size == 4) return V(typename V::Lanes(_mm_max_ps(__m128(a.lanes), __m128(b.lanes))));
#endif
  return V(a.lanes > b.lanes ? a.lanes : b.lanes);
}

// The smaller of the two, and b where either is NaN.
template <typename V>
PAPER_LAYERS_INLINE V min_or_second(V a, V b) {
#if PAPER_LAYERS_VECTOR_BYTES == 64
  if constexpr (V::size == 16) return V(typename V::Lanes(_mm512_min_ps(__m512(a.lanes), __m512(b.lanes))));
#elif PAPER_LAYERS_VECTOR_BYTES == 32
  if constexpr (V::size == 8) return V(typename V::Lanes(_mm256_min_ps(__m256(a.lanes), __m256(b.lanes))));
#elif defined(PAPER_LAYERS_X86)
  if constexpr (V::size == 4) return V(typename V::Lanes(_mm_min_ps(__m128(a.lanes), __m128(b.lanes))));
#endif
  return V(a.lanes < b.lanes ? a.lanes : b.lanes);
}

template <typename T>
PAPER_LAYERS_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
PAPER_LAYERS_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

// Results of more than this are written past the caches, which they would leave before they are read.
constexpr int64_t kStreamingBytes = int64_t(8) << 20;

// Past the caches, to an address of whole vectors.
template <typename T>
PAPER_LAYERS_INLINE void store_streaming(T* p, Vec<T> v) {
#if PAPER_LAYERS_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), __m512i(v.lanes));
#elif PAPER_LAYERS_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), __m256i(v.lanes));
#elif defined(PAPER_LAYERS_X86)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), __m128i(v.lanes));
#else
  store(p, v);
#endif
}

// One number, where its neighbours in memory follow.
template <typename T>
PAPER_LAYERS_INLINE void store_streaming(T* p, T value) {
#ifdef PAPER_LAYERS_X86
  std::conditional_t<sizeof(T) == 8, long long, int> bits;
  static_assert(sizeof(bits) == sizeof(T));
  std::memcpy(&bits, &value, sizeof(bits));
  if constexpr (sizeof(T) == 8) _mm_stream_si64(reinterpret_cast<long long*>(p), bits);
  else _mm_stream_si32(reinterpret_cast<int*>(p), bits);
#else
  *p = value;
#endif
}

// Makes streamed stores visible before what follows.
PAPER_LAYERS_INLINE void finish_streaming() {
#ifdef PAPER_LAYERS_X86
  _mm_sfence();
#endif
}

typedef uint16_t Half16 __attribute__((vector_size(PAPER_LAYERS_VECTOR_BYTES / 2)));
typedef uint32_t Word32 __attribute__((vector_size(PAPER_LAYERS_VECTOR_BYTES)));

PAPER_LAYERS_INLINE Vec<float> load(const c10::BFloat16* p) {
  Half16 half;
  std::memcpy(&half, p, sizeof(half));
  return Vec<float>(Vec<float>::Lanes(__builtin_convertvector(half, Word32) << 16));
}

PAPER_LAYERS_INLINE void store(c10::BFloat16* p, Vec<float> v) {
  const Word32 bits = Word32(v.lanes);
  const Word32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const Half16 half = __builtin_convertvector(v.lanes == v.lanes ? rounded : Word32{} + 0x7fc0u, Half16);
  std::memcpy(p, &half, sizeof(half));
}

PAPER_LAYERS_INLINE Vec<float> load(const c10::Half* p) {
#if PAPER_LAYERS_VECTOR_BYTES == 64
  return Vec<float>(Vec<float>::Lanes(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))));
#elif PAPER_LAYERS_VECTOR_BYTES == 32
  return Vec<float>(Vec<float>::Lanes(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#else
  Vec<float> v;
  for (int64_t i = 0; i < v.size; ++i) v.lanes[i] = static_cast<float>(p[i]);
  return v;
#endif
}

PAPER_LAYERS_INLINE void store(c10::Half* p, Vec<float> v) {
#if PAPER_LAYERS_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(__m512(v.lanes), _MM_FROUND_TO_NEAREST_INT));
#elif PAPER_LAYERS_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(v.lanes), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t i = 0; i < v.size; ++i) p[i] = static_cast<c10::Half>(v.lanes[i]);
#endif
}

// The first n elements, the rest zero; and back.
template <typename T>
PAPER_LAYERS_INLINE auto load(const T* p, int64_t n) {
  T buffer[decltype(load(p))::size] = {};
  std::memcpy(static_cast<void*>(buffer), p, n * sizeof(T));
  return load(static_cast<const T*>(buffer));
}

template <typename T, typename V>
PAPER_LAYERS_INLINE void store(T* p, V v, int64_t n) {
  T buffer[V::size];
  store(buffer, v);
  std::memcpy(static_cast<void*>(p), buffer, n * sizeof(T));
}

#if PAPER_LAYERS_VECTOR_BYTES == 64
PAPER_LAYERS_INLINE Vec<float> load(const float* p, int64_t n) {
  return Vec<float>(Vec<float>::Lanes(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << n) - 1), p)));
}
#endif

// The even-numbered elements of the two, in order.
template <typename V, size_t... I>
PAPER_LAYERS_INLINE V even_lanes(V a, V b, std::index_sequence<I...>) {
  return V(__builtin_shufflevector(a.lanes, b.lanes, static_cast<int>(2 * I)...));
}
template <typename V>
PAPER_LAYERS_INLINE V even_lanes(V a, V b) {
  return even_lanes(a, b, std::make_index_sequence<V::size>());
}

// The odd-numbered ones.
template <typename V, size_t... I>
PAPER_LAYERS_INLINE V odd_lanes(V a, V b, std::index_sequence<I...>) {
  return V(__builtin_shufflevector(a.lanes, b.lanes, static_cast<int>(2 * I + 1)...));
}
template <typename V>
PAPER_LAYERS_INLINE V odd_lanes(V a, V b) {
  return odd_lanes(a, b, std::make_index_sequence<V::size>());
}

// The lanes one half further on.
template <int64_t half, typename Lanes, size_t... I>
PAPER_LAYERS_INLINE Lanes rotated(Lanes lanes, std::index_sequence<I...>) {
  return __builtin_shufflevector(lanes, lanes, static_cast<int>((I + half) % sizeof...(I))...);
}

// All lanes combined, by halves.
template <int64_t half, typename Lanes, typename Combine>
PAPER_LAYERS_INLINE auto folded(Lanes lanes, Combine combine) {
  constexpr size_t size = sizeof(lanes) / sizeof(lanes[0]);
  if constexpr (half == 0) return lanes[0];
  else return folded<half / 2>(combine(lanes, rotated<half>(lanes, std::make_index_sequence<size>())), combine);
}

// The largest lane; none is NaN.
template <typename V>
PAPER_LAYERS_INLINE auto largest_of(V v) {
  return folded<V::size / 2>(v.lanes, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// The sum of numbers or of a comparison's lanes.
template <typename Lanes>
PAPER_LAYERS_INLINE auto total_of(Lanes lanes) {
  return folded<sizeof(lanes) / sizeof(lanes[0]) / 2>(lanes, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

// p[index] for vectors of as many indices.
template <typename T, typename IndexLanes>
PAPER_LAYERS_INLINE Vec<T> gather(const T* p, IndexLanes index) {
#if PAPER_LAYERS_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return typename Vec<T>::Lanes(_mm512_i32gather_ps(__m512i(index), p, 4));
  else return typename Vec<T>::Lanes(_mm512_i32gather_pd(__m256i(index), p, 8));
#else
  Vec<T> v;
  for (int64_t i = 0; i < v.size; ++i) v.lanes[i] = p[index[i]];
  return v;
#endif
}

template <typename T>
PAPER_LAYERS_INLINE T sum(const T* p, int64_t n) {
  Vec<T> lanes(T(0));
  int64_t i = 0;
  for (; i + lanes.size <= n; i += lanes.size) lanes = lanes + load(p + i);
  T total = 0;
  for (int64_t j = 0; j < lanes.size; ++j) total += lanes.lanes[j];
  for (; i < n; ++i) total += p[i];
  return total;
}

// Store the elements of the two in turn: a0 b0 a1 b1 ...
template <typename T, size_t... I>
PAPER_LAYERS_INLINE void store_in_turn(T* to, Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  constexpr int size = Vec<T>::size, half = size / 2;
  store(to, Vec<T>(__builtin_shufflevector(a.lanes, b.lanes, int(I / 2 + I % 2 * size)...)));
  store(to + size, Vec<T>(__builtin_shufflevector(a.lanes, b.lanes, int(half + I / 2 + I % 2 * size)...)));
}
template <typename T>
PAPER_LAYERS_INLINE void store_in_turn(T* to, Vec<T> a, Vec<T> b) {
  store_in_turn(to, a, b, std::make_index_sequence<Vec<T>::size>());
}

// The columns of as many vectors as there are lanes, from and to rows that are `stride` apart.
template <typename T, size_t... I>
PAPER_LAYERS_INLINE void transpose(const T* from, int64_t stride, T* to, std::index_sequence<I...>) {
  constexpr int size = sizeof...(I), half = size / 2;
  Vec<T> rows[size], next[size];
#pragma GCC unroll 16
  for (int i = 0; i < size; ++i) rows[i] = load(from + i * stride);
  // To interleave row i and row i + half moves the highest bit of an element's place to the end.
#pragma GCC unroll 4
  for (int n = 1; n < size; n *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const auto a = rows[i].lanes, b = rows[i + half].lanes;
      next[2 * i] = Vec<T>(__builtin_shufflevector(a, b, int(I / 2 + I % 2 * size)...));
      next[2 * i + 1] = Vec<T>(__builtin_shufflevector(a, b, int(half + I / 2 + I % 2 * size)...));
    }
#pragma GCC unroll 16
    for (int i = 0; i < size; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < size; ++i) store(to + i * stride, rows[i]);
}
template <typename T>
PAPER_LAYERS_INLINE void transpose(const T* from, int64_t stride, T* to) {
  transpose(from, stride, to, std::make_index_sequence<Vec<T>::size>());
}

// Bit i: lane i of a comparison holds.
template <typename BitLanes>
PAPER_LAYERS_INLINE uint32_t lanes_set(BitLanes mask) {
#if PAPER_LAYERS_VECTOR_BYTES == 64
  if constexpr (sizeof(mask[0]) == 4) return _mm512_movepi32_mask(__m512i(mask));
  else return _mm512_movepi64_mask(__m512i(mask));
#elif PAPER_LAYERS_VECTOR_BYTES == 32
  if constexpr (sizeof(mask[0]) == 4) return _mm256_movemask_ps(__m256(mask));
  else return _mm256_movemask_pd(__m256d(mask));
#elif defined(PAPER_LAYERS_X86)
  if constexpr (sizeof(mask[0]) == 4) return _mm_movemask_ps(__m128(mask));
  else return _mm_movemask_pd(__m128d(mask));
#else
  uint32_t bits = 0;
  for (size_t i = 0; i < sizeof(mask) / sizeof(mask[0]); ++i) bits |= static_cast<uint32_t>(mask[i] != 0) << i;
  return bits;
#endif
}

// Bit i: a[i] >= b[i].
template <typename V>
PAPER_LAYERS_INLINE uint32_t lanes_not_below(V a, V b) {
#if PAPER_LAYERS_VECTOR_BYTES == 64
  if constexpr (V::size == 16) return _mm512_cmp_ps_mask(__m512(a.lanes), __m512(b.lanes), _CMP_GE_OQ);
  else return _mm512_cmp_pd_mask(__m512d(a.lanes), __m512d(b.lanes), _CMP_GE_OQ);
#else
  return lanes_set(a.lanes >= b.lanes);
#endif
}

// The number of elements that are not below, of a whole number of vectors.
template <typename T>
PAPER_LAYERS_INLINE int64_t count_not_below(const T* p, int64_t count, Vec<T> than) {
#if PAPER_LAYERS_VECTOR_BYTES == 64
  int64_t result = 0;
  for (int64_t i = 0; i < count; i += than.size) result += __builtin_popcount(lanes_not_below(load(p + i), than));
  return result;
#else
  typename Vec<T>::BitLanes result = {};
  for (int64_t i = 0; i < count; i += than.size) result -= load(p + i).lanes >= than.lanes;
  return total_of(result);
#endif
}

// In place of a number of elements: a whole vector.
struct Full {};

// Calls body(start, Full) for vectors that cover 0 .. length, at least one vector. The last one overlaps the one before
// it, so body must not mind an element twice.
template <int64_t size, typename Body>
PAPER_LAYERS_INLINE void cover_whole(int64_t length, Body&& body) {
  int64_t i = 0;
  for (; i + size <= length; i += size) body(i, Full{});
  if (i < length) body(length - size, Full{});
}

template <typename T>
PAPER_LAYERS_INLINE auto load(const T* p, Full) {
  return load(p);
}
template <typename T, typename V>
PAPER_LAYERS_INLINE void store(T* p, V v, Full) {
  store(p, v);
}

// The same for any length: body(0, length) if it is less than one vector.
template <int64_t size, typename Body>
PAPER_LAYERS_INLINE void cover(int64_t length, Body&& body) {
  if (length >= size) cover_whole<size>(length, body);
  else if (length > 0) body(0, length);
}

// Calls body(write), where write(p, vector, lanes) stores to the rows of `length` values, `count` in all, past the
// caches if they are many and made of whole vectors.
template <typename T, typename Body>
PAPER_LAYERS_INLINE void with_store(const T* rows, int64_t length, int64_t count, const Body& body) {
  if constexpr (std::is_floating_point_v<T>) {
    if (count * int64_t(sizeof(T)) > kStreamingBytes && length % Vec<T>::size == 0 &&
        reinterpret_cast<uintptr_t>(rows) % sizeof(Vec<T>) == 0) {
      // The rest need not be whole vectors, nor start at one.
      body([](T* p, Vec<T> v, auto lanes) __attribute__((always_inline)) {
        const bool whole = std::is_same_v<decltype(lanes), Full> && reinterpret_cast<uintptr_t>(p) % sizeof(v) == 0;
        if (whole) store_streaming(p, v);
        else store(p, v, lanes);
      });
      finish_streaming();
      return;
    }
  }
  body([](T* p, auto v, auto lanes) __attribute__((always_inline)) { store(p, v, lanes); });
}
