// One 2D Gaussian on the pixels of its footprint: the inner loop of everything.
#pragma once

#include "../math.h"
#include "simd.h"

namespace cryosplat {
namespace CRYOSPLAT_ISA {

// Rows between fresh exponentials. Over n rows the recurrence below collects a
// relative error of about n^2/2 roundings: 8e-6 at worst for 16 rows in float.
constexpr int rows_per_restart = 16;

// The recurrence starts at a footprint's first row, where a thin tilted Gaussian
// may be as small as exp(-steepest_exponent) of its peak in some columns. Beyond
// 80 that comes close to float's smallest normal number, exp(-87), and what has
// underflowed cannot grow back: then every row takes its exponential directly.
constexpr double steepest_exponent = 80.0;

// Pixels x0..x1, y0..y1 (inclusive, inside the image); empty if x1 < x0 or y1 < y0.
template <class Scalar>
struct Footprint {
  int x0, x1, y0, y1;
  Scalar mean_x, mean_y;  // of the Gaussian, relative to (x0, y0): small numbers keep their digits
  // q = dx^2 / C_xx + p_yy (dy + slope dx)^2, slope = -C_xy / C_xx: a sum of squares, so that
  // thin tilted Gaussians lose no digits to cancellation.
  Scalar inverse_xx, slope, p_yy;
  Scalar decay;  // exp(-p_yy)
  bool steep;
};

// The exponent q/2 is largest at two corners of the cut-off's rectangle, cutoff^2 / (1 - |rho|);
// so steep means |rho| > 1 - cutoff^2 / steepest_exponent.
template <class T>
inline auto is_steep(T cxx, T cxy, T cyy, double cutoff) {
  const double mildest = 1.0 - cutoff * cutoff / steepest_exponent;
  return cxy * cxy > cxx * cyy * (mildest > 0 ? mildest * mildest : -1.0);
}

// A vector of columns of a footprint, at a row where the recurrence starts.
template <class Scalar>
struct Columns {
  Vector<Scalar> dx, inside;  // offset from the mean; 1 in lanes of the footprint, else 0
  Vector<Scalar> g, r;        // see walk
};

// g and r of the columns at row y.
template <class Scalar>
inline __attribute__((always_inline)) void start_at(const Footprint<Scalar>& f, int y, Columns<Scalar>& c) {
  const Vector<Scalar> e = c.dx * f.slope + (static_cast<Scalar>(y - f.y0) - f.mean_y);
  c.g = c.inside * exponential<Scalar>((c.dx * c.dx * f.inverse_xx + e * e * f.p_yy) * Scalar(-0.5));
  c.r = exponential<Scalar>((e + Scalar(0.5)) * -f.p_yy);
}

// The first of the columns whose vector begins with column `first` of the footprint. The vector is
// moved left where it would reach beyond a row of `stride` elements.
template <class Scalar>
inline int vector_start(int first, int stride) {
  return first < stride - lanes<Scalar> ? first : stride - lanes<Scalar>;
}

template <class Scalar>
inline __attribute__((always_inline)) Columns<Scalar> columns_from(const Footprint<Scalar>& f, int first, int stride) {
  typedef Vector<Scalar> V;
  const V zero{};
  const V offset = ramp<Scalar>() + static_cast<Scalar>(vector_start<Scalar>(first, stride) - f.x0);
  const Scalar from = static_cast<Scalar>(first - f.x0), last = static_cast<Scalar>(f.x1 - f.x0);
  Columns<Scalar> c;
  c.inside = (offset >= from) & (offset <= last) ? zero + Scalar(1) : zero;
  // Lanes outside follow the nearest column of the footprint, so that nothing overflows in them.
  c.dx = larger(smaller(offset - f.mean_x, zero + (last - f.mean_x)), zero - f.mean_x);
  start_at(f, f.y0, c);
  return c;
}

// Calls visit.row(y, x, dy, g) for rows row_begin..row_end-1 of the footprint, a
// vector of columns from x at a time; lanes outside the footprint have g = 0.
// visit.columns(dx) precedes and visit.done() follows the rows of each vector.
// `stride` >= lanes is the length of a row in memory: no vector reaches beyond it.
// `c` holds the footprint's first columns: callers prepare several Gaussians'
// before they walk, since two exponentials are a long wait right after a branch.
//
// With e = dy + slope dx, q = dx^2 / C_xx + p_yy e^2 and g = exp(-q/2):
//   g(y+1) = g(y) r(y),   r(y) = exp(-p_yy (e + 1/2)),   r(y+1) = r(y) exp(-p_yy)
template <class Scalar, class Visitor>
inline __attribute__((always_inline)) void walk(const Footprint<Scalar> f, Columns<Scalar> c, int stride,
                                                int row_begin, int row_end, Visitor& visit) {
  for (int first = f.x0;;) {
    const int x = vector_start<Scalar>(first, stride);
    visit.columns(c.dx);
    for (int start = f.y0; start <= f.y1; start += rows_per_restart) {
      const int stop = (f.y1 < start + rows_per_restart - 1 ? f.y1 : start + rows_per_restart - 1) + 1;
      if (stop <= row_begin) continue;
      if (start >= row_end) break;
      const int end = stop < row_end ? stop : row_end;
      int y = start;
      Scalar dy = static_cast<Scalar>(y - f.y0) - f.mean_y;
      if (f.steep) {
        for (; y < end; ++y, dy += 1) {
          if (y < row_begin) continue;
          start_at(f, y, c);
          visit.row(y, x, dy, c.g);
        }
        continue;
      }
      if (start != f.y0) start_at(f, start, c);
      for (; y < row_begin; ++y, dy += 1) {
        c.g *= c.r;
        c.r *= f.decay;
      }
      for (; y < end; ++y, dy += 1) {
        visit.row(y, x, dy, c.g);
        c.g *= c.r;
        c.r *= f.decay;
      }
    }
    visit.done();
    first += lanes<Scalar>;
    if (first > f.x1) break;
    c = columns_from(f, first, stride);
  }
}

// Adds the Gaussian to an image.
template <class Scalar>
struct Adder {
  Scalar* image;
  std::int64_t stride;
  Scalar peak;

  void columns(Vector<Scalar>) {}
  void row(int y, int x, Scalar, Vector<Scalar> g) {
    Scalar* at = image + y * stride + x;
    store(at, load<Vector<Scalar>>(at) + g * peak);
  }
  void done() {}
};

// Sums residual * g * (1, dx, dy, dx^2, dx dy, dy^2). dx is constant along a
// lane, so the rows need three accumulators and the rest comes after them.
template <class Scalar>
struct MomentSummer {
  typedef Vector<Scalar> V;
  const Scalar* residual;
  std::int64_t stride;
  V dx{}, w_one{}, w_y{}, w_yy{};              // of the columns at hand
  V one{}, x{}, y{}, xx{}, xy{}, yy{};         // of all columns, still lane by lane

  void columns(V dx_of_lanes) {
    dx = dx_of_lanes;
    w_one = w_y = w_yy = V{};
  }
  void row(int row, int column, Scalar dy, V g) {
    const V w = load<V>(residual + row * stride + column) * g;
    const V w_dy = w * dy;
    w_one += w;
    w_y += w_dy;
    w_yy += w_dy * dy;
  }
  void done() {
    const V w_x = w_one * dx;
    one += w_one;
    x += w_x;
    xx += w_x * dx;
    y += w_y;
    xy += w_y * dx;
    yy += w_yy;
  }
  Moments2<Scalar> moments() const {
    return {sum<Scalar>(one), sum<Scalar>(x), sum<Scalar>(y), sum<Scalar>(xx), sum<Scalar>(xy), sum<Scalar>(yy)};
  }
};

}  // namespace CRYOSPLAT_ISA
}  // namespace cryosplat
