// Fourier insertion on CPUs: slabs of planes of the grid, each filled by one thread from all views.
//
// A slab fits the last-level cache, so a pass over the views writes the grid to memory once and every
// coefficient costs arithmetic only. A coefficient belongs to the slab of the lower of its two planes and may spill
// into the first plane of the next, the last slab's into the first slab's; so even slabs go first and odd ones after,
// the last by itself if it is even like the first, and no two threads meet.
#pragma once

#include <cmath>
#include <limits>

#include "mixture.h"

namespace cryosplat {
namespace CRYOSPLAT_ISA {

// Bytes of a slab. Low slabs stay in a nearer cache, but cut rows into pieces of a point or two, each with its set-up:
// 1, 2, 4 and 8 MiB took 90, 61, 49 and 43 ns a coefficient (128 px, 256 views; benchmarks/cpu.md).
constexpr std::int64_t slab_bytes = 8 << 20;

// n (real, imaginary), d, g of two neighbours along x.
template <class Scalar>
using VoxelPair = typename VectorOf<Scalar, 8>::type;

// f(k) = slope k + offset along a row of an image. A fused multiply-add is monotonic in k, so where f passes a bound is
// one place, and slabs that share the bound share every coefficient out between them without gap or overlap.
struct Along {
  double slope, offset;
  double at(std::int64_t k) const { return std::fma(slope, static_cast<double>(k), offset); }
};

struct Interval {
  std::int64_t begin, end;
};

// The k of [begin, end) with f(k) >= bound (below false) or f(k) < bound (below true).
inline Interval where(const Along& f, double bound, bool below, Interval in) {
  if (in.begin >= in.end) return in;
  if ((f.at(in.begin) >= bound) == (f.at(in.end - 1) >= bound)) {
    if ((f.at(in.begin) >= bound) == below) in.end = in.begin;
    return in;
  }
  const double guess = std::ceil((bound - f.offset) / f.slope);
  std::int64_t k = guess <= in.begin ? in.begin : guess >= in.end ? in.end : static_cast<std::int64_t>(guess);
  const bool first = f.at(in.begin) >= bound;
  while (k > in.begin && (f.at(k - 1) >= bound) != first) --k;
  while (k < in.end && (f.at(k) >= bound) == first) ++k;
  if (first == below) in.begin = k;
  else in.end = k;
  return in;
}

// A view's coefficients with the image's origin taken to the first pixel, ready to be spread: (value, weight, 1).
template <class Scalar>
void centre_view(const InsertShape& shape, const InsertInputs<Scalar>& in, std::int64_t v, Scalar* to) {
  const std::int64_t box = shape.box, columns = box / 2 + 1;
  const Scalar* values = in.values + 2 * v * box * columns;
  const Scalar* weights = in.weights + v * box * columns;
  Buffer<double> phase(2 * columns);
  const double turn_x = two_pi * (static_cast<double>(box / 2) - in.shifts[2 * v]) / box;
  const double turn_y = two_pi * (static_cast<double>(box / 2) - in.shifts[2 * v + 1]) / box;
  for (std::int64_t x = 0; x < columns; ++x) {
    phase[2 * x] = std::cos(turn_x * x);
    phase[2 * x + 1] = std::sin(turn_x * x);
  }
  for (std::int64_t y = 0; y < box; ++y) {
    const double ky = static_cast<double>(y < box / 2 ? y : y - box), re = std::cos(turn_y * ky), im = std::sin(turn_y * ky);
    for (std::int64_t x = 0; x < columns; ++x) {
      const std::int64_t i = y * columns + x;
      const Scalar c = static_cast<Scalar>(phase[2 * x] * re - phase[2 * x + 1] * im);
      const Scalar s = static_cast<Scalar>(phase[2 * x] * im + phase[2 * x + 1] * re);
      to[4 * i] = values[2 * i] * c - values[2 * i + 1] * s;
      to[4 * i + 1] = values[2 * i] * s + values[2 * i + 1] * c;
      to[4 * i + 2] = weights[i];
      to[4 * i + 3] = weights[i] != 0 ? Scalar(1) : Scalar(0);
    }
  }
}

template <class Scalar>
class Slab {
 public:
  Slab(const InsertShape& shape, const InsertInputs<Scalar>& in, const Scalar* centred, Scalar* grid,
       std::int64_t first_plane, std::int64_t height)
      : shape_(shape), in_(in), centred_(centred), grid_(grid), low_(static_cast<double>(first_plane)),
        high_(static_cast<double>(first_plane + height)), row_(4 * (shape.padded / 2 + 1)) {}

  void add(std::int64_t v) {
    const Scalar* r = in_.rotations + 9 * v;
    const double scale = static_cast<double>(shape_.padded) / static_cast<double>(shape_.box);
    for (int a = 0; a < 3; ++a) {
      along_x_[a] = scale * r[a];
      along_y_[a] = scale * r[3 + a];
    }
    if (!is_within_grid()) {  // not a rotation: said where everyone looks
      if (low_ <= 0 && high_ > 0)
        for (int i = 0; i < 4; ++i) grid_[i] = std::numeric_limits<Scalar>::quiet_NaN();
      return;
    }
    add_rows<1>(v);
    add_rows<-1>(v);
  }

 private:
  // Whether all points of the view lie within P/2 along every axis; false for NaN.
  bool is_within_grid() const {
    const double half = static_cast<double>(shape_.box / 2), farthest = std::sqrt(half * half - 1);
    bool within = true;
    for (int a = 0; a < 3; ++a)
      within = within && std::hypot(along_x_[a], along_y_[a]) * farthest < static_cast<double>(shape_.padded / 2);
    return within;
  }

  // First kx outside the circle of radius D/2.
  std::int64_t circle_end(std::int64_t ky) const {
    const std::int64_t half = shape_.box / 2, rest = half * half - ky * ky;
    std::int64_t end = static_cast<std::int64_t>(std::sqrt(static_cast<double>(rest)));
    while (end * end < rest) ++end;
    while (end > 0 && (end - 1) * (end - 1) >= rest) --end;
    return end;
  }

  // The rows of a view that can reach the slab: those whose z, between its values at kx = 0 and kx = D/2, overlaps it.
  template <int sign>
  void add_rows(std::int64_t v) {
    const std::int64_t half = shape_.box / 2;
    const double reach = sign * along_x_[2] * static_cast<double>(half), step = sign * along_y_[2];
    const double from = low_ - (reach > 0 ? reach : 0.0), to = high_ - (reach < 0 ? reach : 0.0);
    std::int64_t first = 1 - half, last = half - 1;
    if (std::fabs(step) * static_cast<double>(half) > slack_) {  // else every row is at the same z
      const double a = (step > 0 ? from : to) / step, b = (step > 0 ? to : from) / step;
      if (a - 1 > static_cast<double>(first)) first = a - 1 > static_cast<double>(half) ? half : static_cast<std::int64_t>(std::floor(a - 1));
      if (b + 1 < static_cast<double>(last)) last = b + 1 < static_cast<double>(-half) ? -half : static_cast<std::int64_t>(std::ceil(b + 1));
    }
    for (std::int64_t ky = first; ky <= last; ++ky) {
      const std::int64_t y = ky < 0 ? ky + shape_.box : ky;
      add_row<sign>(centred_ + 4 * (v * shape_.box + y) * (half + 1), ky, {ky < 0 ? 1 : 0, circle_end(ky)});
    }
  }

  // The part of a row that falls into the slab itself (sign 1) or through its Friedel mates (sign -1).
  template <int sign>
  void add_row(const Scalar* row, std::int64_t ky, Interval in) {
    Along q[3];
    for (int a = 0; a < 3; ++a) q[a] = {sign * along_x_[a], sign * along_y_[a] * static_cast<double>(ky)};
    if (in.begin >= in.end) return;
    const double z0 = q[2].at(in.begin), z1 = q[2].at(in.end - 1);
    if ((z0 < low_ && z1 < low_) || (z0 >= high_ && z1 >= high_)) return;
    in = where(q[2], high_, true, where(q[2], low_, false, in));
    // x >= 0 is the half that is stored; of a point with x = 0 the coefficient itself is taken, not its mate.
    in = where(q[0], sign > 0 ? 0.0 : smallest_, false, in);
    for (std::int64_t k = in.begin; k < in.end; ++k) spread<sign>(row + 4 * k, q[0].at(k), q[1].at(k), q[2].at(k));
  }

  template <int sign>
  void spread(const Scalar* from, double x, double y, double z) {
    const double floor_y = std::floor(y), floor_z = std::floor(z);
    const std::int64_t ix = static_cast<std::int64_t>(x), iy = static_cast<std::int64_t>(floor_y),
                       iz = static_cast<std::int64_t>(floor_z);
    const Scalar fx = static_cast<Scalar>(x - static_cast<double>(ix)), fy = static_cast<Scalar>(y - floor_y),
                 fz = static_cast<Scalar>(z - floor_z);
    const Scalar gx = 1 - fx, gy = 1 - fy, gz = 1 - fz;
    const Scalar re = from[0], im = sign * from[1], w = from[2], seen = from[3];
    const VoxelPair<Scalar> pair = {re * gx, im * gx, w * gx, seen * gx, re * fx, im * fx, w * fx, seen * fx};
    Scalar* plane0 = grid_ + wrapped(iz) * shape_.padded * row_;
    Scalar* plane1 = grid_ + wrapped(iz + 1) * shape_.padded * row_;
    const std::int64_t at0 = wrapped(iy) * row_ + 4 * ix, at1 = wrapped(iy + 1) * row_ + 4 * ix;
    add_pair(plane0 + at0, pair, gy * gz);
    add_pair(plane0 + at1, pair, fy * gz);
    add_pair(plane1 + at0, pair, gy * fz);
    add_pair(plane1 + at1, pair, fy * fz);
  }

  static void add_pair(Scalar* to, const VoxelPair<Scalar>& pair, Scalar t) {
    VoxelPair<Scalar> sum;  // wider than a register for some instruction sets, so copied, never passed by value
    std::memcpy(&sum, to, sizeof(sum));
    sum += pair * t;
    std::memcpy(to, &sum, sizeof(sum));
  }

  std::int64_t wrapped(std::int64_t frequency) const { return frequency < 0 ? frequency + shape_.padded : frequency; }

  static constexpr double smallest_ = 5e-324, slack_ = 1e-3;

  const InsertShape& shape_;
  const InsertInputs<Scalar>& in_;
  const Scalar* centred_;
  Scalar* grid_;
  const double low_, high_;
  const std::int64_t row_;
  double along_x_[3], along_y_[3];
};

template <class Scalar>
void insert(const InsertShape& shape, const InsertInputs<Scalar>& in, Scalar* accumulators, int threads) {
  const std::int64_t padded = shape.padded, image = shape.box * (shape.box / 2 + 1);
  const std::int64_t plane_bytes = padded * (padded / 2 + 1) * 4 * static_cast<std::int64_t>(sizeof(Scalar));
  const std::int64_t height = slab_bytes / plane_bytes > 1 ? slab_bytes / plane_bytes : 1;
  const std::int64_t slabs = (padded + height - 1) / height;
  Buffer<Scalar> centred(shape.views * image * 4);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t v = 0; v < shape.views; ++v) centre_view(shape, in, v, centred.get() + v * image * 4);

  const std::int64_t alone = slabs > 1 ? slabs % 2 : 0;  // the last slab, where it is even and meets the first
  const std::int64_t first_slab[] = {0, 1, slabs - 1}, in_phase[] = {(slabs + 1) / 2 - alone, slabs / 2, alone};
  for (int phase = 0; phase < 3; ++phase) {
    const std::int64_t tasks = in_phase[phase];
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (std::int64_t task = 0; task < shape.grids * tasks; ++task) {
      const std::int64_t grid = task / tasks, slab = 2 * (task % tasks) + first_slab[phase];
      const std::int64_t first = slab * height - padded / 2;
      const std::int64_t left = padded / 2 - first, planes = left < height ? left : height;
      Slab<Scalar> filled(shape, in, centred.get(), accumulators + grid * padded * padded * (padded / 2 + 1) * 4, first,
                          planes);
      for (std::int64_t v = 0; v < shape.views; ++v)
        if (in.grid[v] == grid) filled.add(v);
    }
  }
}

}  // namespace CRYOSPLAT_ISA
}  // namespace cryosplat
