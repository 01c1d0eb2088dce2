// Gradients by gathering: a group of 4 lanes owns a Gaussian and walks the layers (views of a batch, planes of a
// volume) it is seen in. In each it sums the residual over its footprint, weighted with the Gaussian and the powers of
// the offset: the six moments of math.h, which all gradients are linear in. Nothing is added in memory; sums run in a
// fixed order, so the result is the same on every run.
//
// 4 layers are taken at a time: lane i prepares layer i, all lanes walk one layer after another, and lane i gets the
// moments of layer i for the chain rule.
#pragma once

#include "footprint.h"

namespace cryosplat {
namespace cuda {

namespace {

using device::Moments2;
using device::PlanarGradient;

constexpr int gather_threads = 256, groups_in_block = gather_threads / group_lanes;

// Blocks of a multiprocessor, at a time, at least: as many as leave registers enough for no spill.
template <class T, bool poses, bool is_aligned>
constexpr int gather_blocks = sizeof(T) == 8 ? 1 : poses || !is_aligned ? 2 : 3;

// A footprint of more pixels is walked by the whole warp, for its groups in turn, lest one lane in eight works.
constexpr int wide_pixels = 2048;

// Pixels of a row that a lane takes at a time, and lanes that share a row. In a whole warp the others take the next.
constexpr int quad = 4, quad_lanes = group_lanes;

// Rows that a lane loads before it uses the first: memory answers in some 300 cycles. One of steep Gaussians, whose
// offsets take the registers.
template <bool steep>
constexpr int rows_at_once = steep ? 1 : 2;

template <class T>
struct alignas(16) Quad {
  T pixels[quad];
};

// A footprint in a layer, as the lanes of a group read it. Columns are counted from the quad that holds the first.
template <class T>
struct Walk {
  const T* residual;  // at that quad, in the first row
  T mean_x, mean_y, scaled_xx, slope, scaled_yy;
  short first, last;  // columns
  short height;
  bool steep : 1, is_seen : 1, is_wide : 1;

  Walk() = default;
  __device__ Walk(const Footprint<T>& f, const T* layer, int box, T mildest)
      : residual(layer + Index(f.y.first) * box + (f.x.first & ~(quad - 1))),
        mean_x(f.mean_x + T(f.x.first & (quad - 1))),
        mean_y(f.mean_y),
        scaled_xx(f.inverse_xx * T(half_log2_e)),
        slope(f.slope),
        scaled_yy(f.p_yy * T(half_log2_e)),
        first(f.x.first & (quad - 1)),
        last(first + f.x.last - f.x.first),
        height(f.y.last - f.y.first + 1),
        steep(is_steep(f, mildest)),
        is_seen(last >= first && height > 0),
        is_wide(is_seen && height * (last + 1) > wide_pixels) {}
};

// The moments are those of dx and e = dy + slope dx, in which the Gaussian's axes are at right angles: about dx and dy a
// thin tilted one would lose all its digits to cancellation. What Moments2 calls y is e here.
//
// Sums over columns x, x + 1, x + 2, x + 3, about x; `y` of dy or of e.
template <class T>
struct QuadSums {
  T one, x, xx, y, xy, yy;

  __device__ void add(const T (&w)[quad], T dy) {
    const T sum = (w[0] + w[1]) + (w[2] + w[3]);
    const T by_x = w[1] + 2 * w[2] + 3 * w[3], by_xx = w[1] + 4 * w[2] + 9 * w[3], by_y = dy * sum;
    one += sum;
    x += by_x;
    xx += by_xx;
    y += by_y;
    xy += dy * by_x;
    yy += dy * by_y;
  }

  __device__ void add(const T (&w)[quad], const T (&e)[quad]) {
    one += (w[0] + w[1]) + (w[2] + w[3]);
    x += w[1] + 2 * w[2] + 3 * w[3];
    xx += w[1] + 4 * w[2] + 9 * w[3];
#pragma unroll
    for (int k = 0; k < quad; ++k) {
      const T by_e = w[k] * e[k];
      y += by_e;
      xy += T(k) * by_e;
      yy += by_e * e[k];
    }
  }
};

// `is_aligned`: rows begin at addresses that vectors can be loaded from. Otherwise pixel by pixel, and none outside.
template <bool is_aligned, class T>
__device__ Quad<T> load_quad(const Walk<T>& walk, int column, int row, int stride) {
  const T* at = walk.residual + (row * stride + column);
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(at));  // the address comes from shared memory, which hides that
#endif
  if constexpr (is_aligned) {
    return *reinterpret_cast<const Quad<T>*>(at);
  } else {
    Quad<T> q;
#pragma unroll
    for (int k = 0; k < quad; ++k)
      q.pixels[k] = column + k >= walk.first && column + k <= walk.last ? __ldg(at + k) : T(0);
    return q;
  }
}

// Four columns at a row `dy` from the mean: values, and ratios to those `rows` further. Zero outside the footprint, where
// they stay zero.
template <class T>
__device__ void start_columns(const Walk<T>& walk, int column, T dx, T dy, T rows, Column<T> (&columns)[quad]) {
#pragma unroll
  for (int k = 0; k < quad; ++k) {
    const bool is_inside = column + k >= walk.first && column + k <= walk.last;
    const T x = dx + k, e = walk.slope * x + dy;
    columns[k].g = is_inside ? exp2_of(-(walk.scaled_xx * x * x + walk.scaled_yy * e * e)) : T(0);
    columns[k].r = is_inside ? exp2_of(-walk.scaled_yy * rows * (2 * e + rows)) : T(0);
  }
}

// Rows row, row + rows, ... of four columns.
template <bool is_aligned, bool steep, class T>
__device__ QuadSums<T> walk_quad(const Walk<T>& walk, int column, int row, int rows, int stride) {
  constexpr int at_once = rows_at_once<steep>;
  static_assert(rows_per_restart % at_once == 0, "restarts fall between loads");
  QuadSums<T> sums = {};
  const T dx = T(column) - walk.mean_x, between = T(rows), decay = exp2_of(-2 * walk.scaled_yy * between * between);
  T dy = T(row) - walk.mean_y;
  while (row < walk.height) {
    Column<T> columns[quad];
    start_columns(walk, column, dx, dy, between, columns);
    for (int step = 0; step < rows_per_restart && row < walk.height; step += at_once) {
      Quad<T> loaded[at_once];
#pragma unroll
      for (int k = 0; k < at_once; ++k, row += rows) {
        loaded[k] = {};
        if (row < walk.height) loaded[k] = load_quad<is_aligned>(walk, column, row, stride);
      }
#pragma unroll
      for (int k = 0; k < at_once; ++k, dy += between) {
        if (steep && step + k > 0) start_columns(walk, column, dx, dy, between, columns);
        T w[quad], e[quad];
#pragma unroll
        for (int i = 0; i < quad; ++i) {
          w[i] = loaded[k].pixels[i] * columns[i].g;  // g is finite beyond the last row too: it only falls there
          e[i] = dy + walk.slope * (dx + i);
          if constexpr (!steep) {
            columns[i].g *= columns[i].r;
            columns[i].r *= decay;
          }
        }
        if constexpr (steep)
          sums.add(w, e);
        else
          sums.add(w, dy);
      }
    }
  }
  return sums;
}

// Adds to `moments` what a lane of `lanes` has of a footprint.
template <bool is_aligned, class T>
__device__ void walk_footprint(const Walk<T> walk, int lane, int lanes, int stride, Moments2<T>* moments) {
  const int rows = lanes / quad_lanes, row = lane / quad_lanes;
  for (int column = lane % quad_lanes * quad; column <= walk.last; column += quad_lanes * quad) {
    const QuadSums<T> s = walk.steep ? walk_quad<is_aligned, true>(walk, column, row, rows, stride)
                                     : walk_quad<is_aligned, false>(walk, column, row, rows, stride);
    const T dx = T(column) - walk.mean_x, tilt = walk.steep ? T(0) : walk.slope;  // e has its slope already
    const T x = dx * s.one + s.x, xx = dx * (dx * s.one + 2 * s.x) + s.xx, xy = dx * s.y + s.xy;
    moments->one += s.one;
    moments->x += x;
    moments->xx += xx;
    moments->y += s.y + tilt * x;
    moments->xy += xy + tilt * xx;
    moments->yy += s.yy + tilt * (2 * xy + tilt * xx);
  }
}

// What a block keeps of its Gaussians: ten sums a lane, whatever they are of. In shared memory, since they are needed
// once in 4 layers and registers are what limits the number of warps.
constexpr int sums_in_lane = 10;

template <class T>
struct GatherMemory {
  Walk<T> walks[groups_in_block][group_lanes];
  Two<T> moments[groups_in_block][group_lanes][3];
  T sums[sums_in_lane][gather_threads];

  __device__ void clear() {
    for (int k = 0; k < sums_in_lane; ++k) sums[k][threadIdx.x] = 0;
  }
  __device__ void add(int k, T value) { sums[k][threadIdx.x] += value; }
  // Over the lanes of a group, in every lane. Called by whole warps.
  __device__ T total(int k) const { return sum_of_group(sums[k][threadIdx.x]); }
};

// Moments of a warp's groups over one layer each, every lane its own part of them.
template <bool is_aligned, class T>
__device__ Moments2<T> walk_layers(const Walk<T> (*walks)[group_lanes], int layer, bool is_there, int stride) {
  const Walk<T>& mine = walks[group_of_warp()][layer];
  Moments2<T> moments = {};
  if (is_there && mine.is_seen && !mine.is_wide)
    walk_footprint<is_aligned>(mine, lane_of_group(), group_lanes, stride, &moments);
  const unsigned wide = __ballot_sync(all_lanes, is_there && mine.is_wide);
#pragma unroll 1
  for (int other = 0; wide && other < groups_in_warp; ++other) {
    if (!(wide & (1u << (other * group_lanes)))) continue;
    Moments2<T> part = {};
    walk_footprint<is_aligned>(walks[other][layer], lane_of_warp(), warp_lanes, stride, &part);
    // Lanes of equal place in their groups together: what is left is as if the group had walked alone.
    part = {sum_over_groups(part.one), sum_over_groups(part.x),  sum_over_groups(part.y),
            sum_over_groups(part.xx),  sum_over_groups(part.xy), sum_over_groups(part.yy)};
    if (group_of_warp() == other) moments = part;
  }
  return moments;
}

// Walks all layers of a group's Gaussian. `layers` has
//   count                      how many
//   footprint(i), residual(i)  in layer i, and the first pixel of that layer
//   add(is_there, i, moments, memory)   called by all lanes of a warp together, each with a layer or none; adds to the
//                                       sums of the lane
template <bool is_aligned, class T, class Layers>
__device__ void gather(const Layers& layers, int box, T mildest, GatherMemory<T>& memory) {
  memory.clear();
  const int lane = lane_of_group(), group = group_of_block(), first_group = warp_of_block() * groups_in_warp;
  for (int first = 0; __any_sync(all_lanes, first < layers.count); first += group_lanes) {
    const bool is_there = first + lane < layers.count;
    if (is_there)
      memory.walks[group][lane] =
          Walk<T>(layers.footprint(first + lane), layers.residual(first + lane), box, mildest);
    __syncwarp();
    for (int i = 0; i < group_lanes && __any_sync(all_lanes, first + i < layers.count); ++i) {
      const Moments2<T> part = walk_layers<is_aligned>(memory.walks + first_group, i, first + i < layers.count, box);
      const T values[2 * group_lanes] = {part.one, part.x, part.y, part.xx, part.xy, part.yy, T(0), T(0)};
      const Two<T> total = transposed_sum_of_group(values);
      if (lane < 3) memory.moments[group][i][lane] = total;
    }
    __syncwarp();
    const Two<T>* m = memory.moments[group][lane];
    const Moments2<T> moments = {m[0].first, m[0].second, m[1].first, m[1].second, m[2].first, m[2].second};
    layers.add(is_there, first + lane, moments, memory);
    __syncwarp();
  }
}

// Gradients from moments of dx and e, where the inverse covariance is diagonal; see math.h's planar_gradient. With
// T = (1 0; slope 1) the way back is T^T g and T^T H T.
template <class T>
__device__ PlanarGradient<T> gradient_of_moments(const Moments2<T>& m, T inverse_xx, T slope, T p_yy, T amplitude) {
  const T x = amplitude * inverse_xx * m.x, e = amplitude * p_yy * m.y, half = amplitude / 2;
  const T h_xx = half * inverse_xx * (inverse_xx * m.xx - m.one), h_xe = half * inverse_xx * p_yy * m.xy,
          h_ee = half * p_yy * (p_yy * m.yy - m.one);
  return {m.one, {x + slope * e, e}, {h_xx + slope * (2 * h_xe + slope * h_ee), h_xe + slope * h_ee, h_ee}};
}

// Whether every row of layers (.., D, D) begins where vectors can be loaded from.
template <class T>
bool are_rows_aligned(const T* layers, Index box) {
  return box % quad == 0 && reinterpret_cast<std::uintptr_t>(layers) % alignof(Quad<T>) == 0;
}

}  // namespace

}  // namespace cuda
}  // namespace cryosplat
