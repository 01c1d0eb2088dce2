// A Gaussian on a plane of pixels: what is prepared once and walked often. Twin of cpu/raster.h.
#pragma once

#include "../math.h"
#include "warp.h"

namespace cryosplat {
namespace cuda {

namespace {

using device::Symmetric2;
using device::Symmetric3;
using device::Vector2;
using device::Vector3;

// Pixels first..last of an axis; none if last < first. Sides stay below 2^15 (largest_box).
struct Range {
  short first, last;
};

constexpr Index largest_box = 4096;

__device__ inline bool is_empty(Range r) { return r.last < r.first; }

// With dx, dy the offsets from the mean and e = dy + slope dx,
//   value = height exp(-1/2 (inverse_xx dx^2 + p_yy e^2)),   slope = -C_xy / C_xx,  p_yy = (C^-1)_yy,
// a sum of squares, so that thin tilted Gaussians lose no digits to cancellation. The mean refers to pixel
// (x.first, y.first): small numbers keep their digits.
//
// A degenerate Gaussian covers the whole plane with a height of NaN: every pixel hears of it, and so does every sum
// over pixels.
template <class T>
struct alignas(16) Footprint {
  T mean_x, mean_y, inverse_xx, slope, p_yy, height;
  Range x, y;
};

template <class T>
__device__ Footprint<T> degenerate(int box) {
  const Range whole = {0, short(box - 1)};
  return {T(0), T(0), T(0), T(0), T(0), T(NAN), whole, whole};
}

// A number as the sum of two, the second a correction to the first: float carries 24 bits of a position, and of these
// 8 go to say where in the image it is.
template <class T>
struct Pair {
  T value, rest;
};

template <class T>
__device__ Pair<T> plus(Pair<T> a, T b) {
  const T sum = a.value + b, of_b = sum - a.value;
  return {sum, a.rest + ((a.value - (sum - of_b)) + (b - of_b))};
}

// a . b + c + d, as a compensated sum (Ogita, Rump, Oishi 2005, "Dot2").
template <class T>
__device__ Pair<T> position(const Vector3<T>& a, const Vector3<T>& b, T c, T d) {
  const T x = product(a.x, b.x), y = product(a.y, b.y), z = product(a.z, b.z);
  Pair<T> sum = plus(plus(plus(plus({c, T(0)}, d), x), y), z);
  sum.rest += fma(a.x, b.x, -x) + fma(a.y, b.y, -y) + fma(a.z, b.z, -z);
  return sum;
}

// Whole pixels within `reach` of a position, inside 0..box-1, and the position relative to the first. Clamped before
// the conversion, so that far or huge Gaussians stay within an int.
template <class T>
__device__ Range pixels(Pair<T> at, T reach, int box, T* relative) {
  const T low = fmin(fmax(ceil(at.value - reach), T(0)), T(box));
  const T high = fmin(fmax(floor(at.value + reach), T(-1)), T(box - 1));
  *relative = (at.value - low) + at.rest;
  return {short(low), short(high)};
}

// The exponent q/2 is largest at two corners of the cut-off's rectangle, cutoff^2 / (1 - |rho|). Recurrences over rows
// begin at the first row of a footprint, where float must not have underflowed: it could not grow back. So Gaussians
// with |rho| > mildest take an exponential at every pixel. steepest_exponent as in cpu/raster.h.
constexpr double steepest_exponent = 80.0;

inline double mildest_correlation(double cutoff) {
  const double mildest = 1.0 - cutoff * cutoff / steepest_exponent;
  return mildest > 0 ? mildest : -1.0;
}

// rho^2 = slope^2 p_yy / (inverse_xx + slope^2 p_yy).
template <class T>
__device__ bool is_steep(const Footprint<T>& f, T mildest) {
  const T tilt = f.slope * f.slope * f.p_yy;
  return mildest < 0 || tilt * (1 - mildest * mildest) > mildest * mildest * f.inverse_xx;
}

// Rows between fresh exponentials, as in cpu/raster.h: over n rows the recurrence collects n^2/2 roundings.
constexpr int rows_per_restart = 16;

constexpr double half_log2_e = 0.72134752044448170367996234050095;  // exp(-q/2) = 2^(-q half_log2_e)

// What a covariance is on a plane of pixels, of unit amplitude.
template <class T>
struct Planar {
  T xx, yy;  // variances
  T inverse_xx, slope, p_yy, peak;
  bool is_proper;
};

template <class T, class Precise>
__device__ Planar<T> planar(const Symmetric2<Precise>& c) {
  const Precise det = determinant(c), inverse_xx = 1 / c.xx;
  return {T(c.xx),
          T(c.yy),
          T(inverse_xx),
          T(-c.xy * inverse_xx),
          T(c.xx / det),
          T(1 / (Precise(device::two_pi) * sqrt(det))),
          c.xx > 0 && c.yy > 0 && det > 0 && det * 0 == 0};
}

// A determinant below this part of the variances' product has lost too many of float's digits: such Gaussians, thin and
// tilted, are projected in double. Above it the loss is less than 10 roundings.
constexpr float thin = 0.1f;

template <class T>
__device__ bool is_thin(const Symmetric2<T>& c) {
  return !(determinant(c) > T(thin) * c.xx * c.yy);  // true for NaN
}

// The recurrence of a column: value g at a row, and its ratio r to the next.
template <class T>
struct Column {
  T g, r;
};

// g = exp(-q/2) and r = exp(-p_yy (e + 1/2)); scaled_xx = inverse_xx dx^2 half_log2_e, scaled_yy = p_yy half_log2_e.
template <class T>
__device__ Column<T> start_column(T scaled_xx, T scaled_yy, T e) {
  return {exp2_of(-(scaled_xx + scaled_yy * e * e)), exp2_of(-scaled_yy * (e + e + 1))};
}

}  // namespace

}  // namespace cuda
}  // namespace cryosplat
