// Gradients by gathering: a group of 8 lanes owns a Gaussian and walks the layers (views of a batch, planes of a
// volume) it is seen in. In each it sums the residual over its footprint, weighted with the Gaussian and the powers of
// the offset: the six moments of math.h, which all gradients are linear in. Nothing is added in memory; sums run in a
// fixed order, so the result is the same on every run.
//
// 8 layers are taken at a time: lane i prepares layer i, all lanes walk one layer after another, and lane i gets the
// moments of layer i for the chain rule.
#pragma once

#include "footprint.h"

namespace cryosplat {
namespace cuda {

namespace {

using device::Moments2;

constexpr int gather_threads = 256, groups_in_block = gather_threads / group_lanes;

// Of a multiprocessor, at a time, at least: as many as leave registers enough for no spill.
template <class T>
constexpr int gather_blocks = sizeof(T) == 4 ? 3 : 1;
template <class T>
constexpr int gather_blocks_with_poses = sizeof(T) == 4 ? 2 : 1;

// A footprint of more pixels is walked by the whole warp, for its groups in turn, lest one lane in four works.
constexpr int wide_pixels = 2048;

// A footprint in a layer, as the lanes of a group read it.
template <class T>
struct Walk {
  const T* residual;  // at its first pixel
  T mean_x, mean_y, scaled_xx, slope, scaled_yy, decay;
  int width, height;
  bool steep;

  Walk() = default;
  __device__ Walk(const Footprint<T>& f, const T* layer, int box, T mildest)
      : residual(layer + Index(f.y.first) * box + f.x.first),
        mean_x(f.mean_x),
        mean_y(f.mean_y),
        scaled_xx(f.inverse_xx * T(half_log2_e)),
        slope(f.slope),
        scaled_yy(f.p_yy * T(half_log2_e)),
        decay(exp2_of(-2 * scaled_yy)),
        width(f.x.last - f.x.first + 1),
        height(f.y.last - f.y.first + 1),
        steep(is_steep(f, mildest)) {}
};

// Moments over rows of one column: w, w dy, w dy^2. dx is constant along it.
template <class T>
struct ColumnSums {
  T one, y, yy;
};

// Rows that are loaded before the first is used: memory answers in some 300 cycles.
constexpr int rows_at_once = 4;

// Adds rows dy, dy + 1, dy + 2, dy + 3 of weights w.
template <class T>
__device__ void add_rows(const T (&w)[rows_at_once], T dy, ColumnSums<T>* sums) {
  const T one = (w[0] + w[1]) + (w[2] + w[3]);
  const T row = w[1] + 2 * w[2] + 3 * w[3], square = w[1] + 4 * w[2] + 9 * w[3];
  sums->one += one;
  sums->y += dy * one + row;
  sums->yy += dy * (dy * one + 2 * row) + square;
}

template <bool steep, class T>
__device__ ColumnSums<T> walk_column(const Walk<T>& walk, int column, T dx, int stride) {
  static_assert(rows_per_restart % rows_at_once == 0, "restarts fall between loads");
  const T scaled_xx = walk.scaled_xx * dx * dx, tilt = walk.slope * dx;
  ColumnSums<T> sums = {T(0), T(0), T(0)};
  Column<T> c = {T(0), T(0)};
  T dy = -walk.mean_y;
  int at = column;  // from the footprint's first pixel: 32 bits, which are cheaper to add to than an address
#pragma unroll 1
  for (int left = walk.height, row = 0; left > 0; left -= rows_at_once, row += rows_at_once, dy += rows_at_once) {
    T w[rows_at_once];
#pragma unroll
    for (int k = 0; k < rows_at_once; ++k, at += stride) w[k] = left > k ? __ldg(walk.residual + at) : T(0);
    if (!steep && row % rows_per_restart == 0) c = start_column(scaled_xx, walk.scaled_yy, tilt + dy);
#pragma unroll
    for (int k = 0; k < rows_at_once; ++k) {
      if constexpr (steep) {
        w[k] *= start_column(scaled_xx, walk.scaled_yy, tilt + (dy + k)).g;
      } else {
        w[k] *= c.g;  // finite beyond the last row too: it only falls there
        c.g *= c.r;
        c.r *= walk.decay;
      }
    }
    add_rows(w, dy, &sums);
  }
  return sums;
}

// Adds to `moments` the columns lane, lane + lanes, ... of a footprint.
template <class T>
__device__ void walk_columns(const Walk<T> walk, int lane, int lanes, int stride, Moments2<T>* moments) {
  for (int column = lane; column < walk.width; column += lanes) {
    const T dx = T(column) - walk.mean_x;
    const ColumnSums<T> sums =
        walk.steep ? walk_column<true>(walk, column, dx, stride) : walk_column<false>(walk, column, dx, stride);
    const T x = sums.one * dx;
    moments->one += sums.one;
    moments->x += x;
    moments->xx += x * dx;
    moments->y += sums.y;
    moments->xy += sums.y * dx;
    moments->yy += sums.yy;
  }
}

template <class T>
struct GatherMemory {
  Walk<T> walks[groups_in_block][group_lanes];
  T moments[groups_in_block][group_lanes][6];
};

// Moments of a warp's four groups over one layer each, every lane its own part of them.
template <class T>
__device__ Moments2<T> walk_layers(const Walk<T> (*walks)[group_lanes], int layer, bool is_there, int stride) {
  const int warp_lane = int(threadIdx.x) % warp_lanes, lane = warp_lane % group_lanes, group = warp_lane / group_lanes;
  const Walk<T>& mine = walks[group][layer];
  Moments2<T> moments = {};
  const bool is_wide = is_there && mine.width > 0 && mine.height > wide_pixels / mine.width;
  if (is_there && !is_wide) walk_columns(mine, lane, group_lanes, stride, &moments);
  const unsigned wide = __ballot_sync(all_lanes, is_wide);
  for (int other = 0; wide && other < groups_in_warp; ++other) {
    if (!(wide & (1u << (other * group_lanes)))) continue;
    Moments2<T> part = {};
    walk_columns(walks[other][layer], warp_lane, warp_lanes, stride, &part);
    // Lanes of equal place in their groups together: what is left is as if the group had walked alone.
    part = {sum_over_groups(part.one), sum_over_groups(part.x),  sum_over_groups(part.y),
            sum_over_groups(part.xx),  sum_over_groups(part.xy), sum_over_groups(part.yy)};
    if (group == other) moments = part;
  }
  return moments;
}

// Walks all layers of a group's Gaussian. `layers` has
//   count                      how many
//   footprint(i), residual(i)  in layer i, and the first pixel of that layer
//   add(is_there, i, footprint, moments)   called by all lanes of a warp together, each with its own layer, or none
template <class T, class Layers>
__device__ void gather(Layers& layers, int box, T mildest) {
  __shared__ GatherMemory<T> memory;
  const int thread = int(threadIdx.x), lane = thread % group_lanes, group = thread / group_lanes;
  const int first_group = thread / warp_lanes * groups_in_warp;
  for (int first = 0; __any_sync(all_lanes, first < layers.count); first += group_lanes) {
    const bool is_there = first + lane < layers.count;
    Footprint<T> footprint = {};
    if (is_there) {
      footprint = layers.footprint(first + lane);
      memory.walks[group][lane] = Walk<T>(footprint, layers.residual(first + lane), box, mildest);
    }
    __syncwarp();
    for (int i = 0; i < group_lanes && __any_sync(all_lanes, first + i < layers.count); ++i) {
      const Moments2<T> part = walk_layers(memory.walks + first_group, i, first + i < layers.count, box);
      const T values[group_lanes] = {part.one, part.x, part.y, part.xx, part.xy, part.yy, T(0), T(0)};
      const T total = transposed_sum_of_group(values, lane);
      if (lane < 6) memory.moments[group][i][lane] = total;
    }
    __syncwarp();
    const T* m = memory.moments[group][lane];
    layers.add(is_there, first + lane, footprint, Moments2<T>{m[0], m[1], m[2], m[3], m[4], m[5]});
    __syncwarp();
  }
}

}  // namespace

}  // namespace cuda
}  // namespace cryosplat
