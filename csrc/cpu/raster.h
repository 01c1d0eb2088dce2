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
  Scalar peak;  // the visitors' business: the walk is of unit height
  bool steep;
};

// The exponent q/2 is largest at two corners of the cut-off's rectangle, cutoff^2 / (1 - |rho|).
template <class T>
inline auto is_steep(T cxx, T cxy, T cyy, double cutoff) {
  const T rho = larger(cxy, -cxy) / square_root(cxx * cyy);
  return (1.0 - rho) * steepest_exponent < T{} + cutoff * cutoff;
}

// Calls visit.row(y, x, dy, g) for rows row_begin..row_end-1 of the footprint, a
// vector of columns from x at a time; lanes outside the footprint have g = 0.
// visit.columns(dx) precedes and visit.done() follows the rows of each vector.
// `stride` >= lanes is the length of a row in memory: no vector reaches beyond it.
//
// With e = dy + slope dx, q = dx^2 / C_xx + p_yy e^2 and g = exp(-q/2):
//   g(y+1) = g(y) r(y),   r(y) = exp(-p_yy (e + 1/2)),   r(y+1) = r(y) exp(-p_yy)
template <class Scalar, class Visitor>
inline __attribute__((always_inline)) void walk(const Footprint<Scalar>& f, int stride, int row_begin, int row_end,
                                                Visitor& visit) {
  typedef Vector<Scalar> V;
  const V zero{};
  const Scalar last_dx = static_cast<Scalar>(f.x1 - f.x0) - f.mean_x;
  const V decay = exponential<Scalar>(zero - f.p_yy);
  for (int first = f.x0; first <= f.x1; first += lanes<Scalar>) {
    const int x = first < stride - lanes<Scalar> ? first : stride - lanes<Scalar>;
    const V offset = ramp<Scalar>() + static_cast<Scalar>(x - f.x0);
    const auto inside = (offset >= static_cast<Scalar>(first - f.x0)) & (offset <= static_cast<Scalar>(f.x1 - f.x0));
    // Lanes outside follow the nearest column, so that nothing overflows in them.
    const V dx = larger(smaller(offset - f.mean_x, zero + last_dx), zero - f.mean_x);
    const V one = inside ? zero + Scalar(1) : zero;
    const V tilt = dx * f.slope, q_x = dx * dx * f.inverse_xx;
    visit.columns(dx);
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
          const V e = tilt + dy;
          visit.row(y, x, dy, one * exponential<Scalar>((q_x + e * e * f.p_yy) * Scalar(-0.5)));
        }
        continue;
      }
      const V e = tilt + dy;
      V g = one * exponential<Scalar>((q_x + e * e * f.p_yy) * Scalar(-0.5));
      V r = exponential<Scalar>((e + Scalar(0.5)) * -f.p_yy);
      for (; y < row_begin; ++y, dy += 1) {
        g *= r;
        r *= decay;
      }
      for (; y < end; ++y, dy += 1) {
        visit.row(y, x, dy, g);
        g *= r;
        r *= decay;
      }
    }
    visit.done();
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
  Moments2<Scalar> total{};  // still to be multiplied by the peak
  V dx{}, w_one{}, w_y{}, w_yy{};

  void columns(V dx_of_lanes) {
    dx = dx_of_lanes;
    w_one = w_y = w_yy = V{};
  }
  void row(int y, int x, Scalar dy, V g) {
    const V w = load<V>(residual + y * stride + x) * g;
    w_one += w;
    w_y += w * dy;
    w_yy += w * (dy * dy);
  }
  void done() {
    const V w_x = w_one * dx;
    total.one += sum<Scalar>(w_one);
    total.x += sum<Scalar>(w_x);
    total.xx += sum<Scalar>(w_x * dx);
    total.y += sum<Scalar>(w_y);
    total.xy += sum<Scalar>(w_y * dx);
    total.yy += sum<Scalar>(w_yy);
  }
};

}  // namespace CRYOSPLAT_ISA
}  // namespace cryosplat
