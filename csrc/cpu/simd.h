// Vectors of the compiler's own kind, as wide as the instruction set, and the
// few functions on them. One source serves every instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace cryosplat {
namespace CRYOSPLAT_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class Scalar, int lanes_>
struct VectorOf {
  typedef Scalar type __attribute__((vector_size(lanes_ * sizeof(Scalar))));
};

// As many lanes of Scalar as fit one register.
template <class Scalar>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(Scalar));

template <class Scalar>
using Vector = typename VectorOf<Scalar, lanes<Scalar>>::type;

template <class V, class Scalar>
inline V load(const Scalar* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class Scalar>
inline void store(Scalar* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

template <class Scalar>
inline Vector<Scalar> ramp() {
  Vector<Scalar> v;
  for (int i = 0; i < lanes<Scalar>; ++i) v[i] = static_cast<Scalar>(i);
  return v;
}

template <class V>
inline V smaller(V a, V b) {
  return a < b ? a : b;
}

template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline V square_root(V v) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// Sum of the lanes, by halves: a fixed order for any width.
template <class Scalar, int n>
inline __attribute__((always_inline)) Scalar sum_lanes(typename VectorOf<Scalar, n>::type v) {
  if constexpr (n == 1) {
    return v[0];
  } else {
    // Through a union, not memcpy: the compiler then takes the halves from the register.
    typedef typename VectorOf<Scalar, n / 2>::type Half;
    union {
      typename VectorOf<Scalar, n>::type whole;
      Half half[2];
    } parts{v};
    return sum_lanes<Scalar, n / 2>(parts.half[0] + parts.half[1]);
  }
}

template <class Scalar>
inline __attribute__((always_inline)) Scalar sum(Vector<Scalar> v) {
  return sum_lanes<Scalar, lanes<Scalar>>(v);
}

// How exp is taken apart for each precision: exp(x) = 2^n exp(f), |f| <= ln 2 / 2,
// exp(f) by its Taylor polynomial, whose remainder at the ends of that interval
// is below half a unit in the last place.
template <class Scalar>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  typedef std::int32_t Integer;
  static constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float log2_e = 1.44269504088896341f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float lowest = -87.0f, highest = 88.0f;
  static constexpr int degree = 7, exponent_bias = 127, mantissa_bits = 23;
};

template <>
struct ExpConstants<double> {
  typedef std::int64_t Integer;
  static constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2_e = 1.44269504088896340736;
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr double lowest = -708.0, highest = 709.0;
  static constexpr int degree = 13, exponent_bias = 1023, mantissa_bits = 52;
};

constexpr double inverse_factorial(int n) { return n <= 1 ? 1.0 : inverse_factorial(n - 1) / n; }

// exp of every lane; arguments below `lowest` give exp(lowest), about 1e-38 or 1e-308.
// NaN lanes give NaN.
template <class Scalar>
inline __attribute__((always_inline)) Vector<Scalar> exponential(Vector<Scalar> x) {
  typedef ExpConstants<Scalar> K;
  typedef typename VectorOf<typename K::Integer, lanes<Scalar>>::type IntegerVector;
  const Vector<Scalar> zero{};
  const Vector<Scalar> low = zero + K::lowest, high = zero + K::highest;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vector<Scalar> shifted = x * K::log2_e + K::rounder;
  const Vector<Scalar> n = shifted - K::rounder;
  const Vector<Scalar> f = (x - n * K::ln2_high) - n * K::ln2_low;
  // Estrin's scheme, pairs at a time: a third of the latency of Horner's chain.
  Vector<Scalar> p[K::degree + 1], power_of_f = f;
#pragma GCC unroll 16
  for (int i = 0; i <= K::degree; ++i) p[i] = zero + static_cast<Scalar>(inverse_factorial(i));
#pragma GCC unroll 8
  for (int terms = K::degree + 1; terms > 1; terms = (terms + 1) / 2, power_of_f *= power_of_f)
#pragma GCC unroll 8
    for (int i = 0; 2 * i < terms; ++i) p[i] = 2 * i + 1 < terms ? p[2 * i] + p[2 * i + 1] * power_of_f : p[2 * i];
  // `shifted` holds n in its low bits; its own exponent bits leave with the shift.
  IntegerVector bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + K::exponent_bias) << K::mantissa_bits;
  Vector<Scalar> power;
  std::memcpy(&power, &bits, sizeof(power));
  return p[0] * power;
}

}  // namespace CRYOSPLAT_ISA
}  // namespace cryosplat
