// Drawing by gathering: every pixel's sum is made in a register, in the order of the Gaussians, without atomics. So the
// result is the same on every run.
//
// A layer (the image of a view, the plane of a volume) is cut into regions of 32 x 32 pixels, a block each, and these
// into tiles of 8 x 8, a warp each. Which Gaussians reach a region is a row of bits, a bit a Gaussian, which the
// kernels that prepare footprints write by ballots: no sorting, no counting, a size that is known beforehand, and an
// order that is kept. The block takes up to `chunk` set bits at a time, stages their footprints in shared memory, and
// each warp picks those of its tile. Sets of 4 or 8 lanes then take a Gaussian each, with the tile's pixels in
// registers; the sets' sums are added at the end.
#pragma once

#include "footprint.h"

namespace cryosplat {
namespace cuda {

namespace {

constexpr int tile_side = 8, region_side = 32;
static_assert(tile_side == 8, "a byte has a bit a row");

// A footprint's part in a tile is drawn by a set of lanes, one or two columns each. With two, what is the same for both
// is done once, and twice as many registers hold pixels.
template <int lane_columns>
struct Sets {
  static constexpr int lanes = tile_side / lane_columns, in_warp = warp_lanes / lanes;
};

constexpr int tiles_along = region_side / tile_side, tiles_in_region = tiles_along * tiles_along;
constexpr int draw_threads = warp_lanes * tiles_in_region;
// Of a multiprocessor, at a time: 32 warps, which is what one of sm_75 takes at most.
template <class T>
constexpr int draw_blocks = sizeof(T) == 4 ? 2 : 1;

constexpr int chunk = 256;

// Threads of the kernels that prepare, a Gaussian each; they write whole sectors of 8 words to the rows of bits.
constexpr int prepare_threads = 256, words_in_block = prepare_threads / warp_lanes;
constexpr int most_regions_along = largest_box / region_side;

// The rows of bits: (layers, regions along y, regions along x, words).
struct Bits {
  unsigned* words;
  int regions_along;
  int words_in_row;

  __host__ __device__ Index row(Index layer, int region) const {
    return (layer * regions_along * regions_along + region) * words_in_row;
  }
};

inline Bits bits_of(Index gaussians, Index box) {
  return {nullptr, int(pieces(box, region_side)), int(pieces(gaussians, prepare_threads) * words_in_block)};
}

inline Index count_words(const Bits& bits, Index layers) {
  return layers * bits.regions_along * bits.regions_along * bits.words_in_row;
}

// Which Gaussians of a block reach each region along an axis.
struct AxisBits {
  unsigned of_region[most_regions_along][words_in_block];

  __device__ void set(Range range, int regions) {
    const int lane = lane_of_warp(), warp = warp_of_block();
    for (int region = 0; region < regions; ++region) {
      const bool reaches = range.first < (region + 1) * region_side && range.last >= region * region_side;
      const unsigned word = __ballot_sync(all_lanes, reaches && !is_empty(range));
      if (lane == 0) of_region[region][warp] = word;
    }
  }
};

// Writes the words of a block of Gaussians, number `block`, in the rows of a layer. Called by the whole block, after a
// barrier. `of_layer` is a word's part that reaches the layer at all.
__device__ inline void write_bits(const Bits& bits, Index layer, Index block, const AxisBits& columns,
                                  const AxisBits& rows, const unsigned* of_layer) {
  const int regions = bits.regions_along * bits.regions_along;
  for (int i = int(threadIdx.x); i < regions * words_in_block; i += prepare_threads) {
    const int word = i % words_in_block, region = i / words_in_block;
    const unsigned reached = columns.of_region[region % bits.regions_along][word] &
                             rows.of_region[region / bits.regions_along][word] & of_layer[word];
    bits.words[bits.row(layer, region) + block * words_in_block + word] = reached;
  }
}

// Footprints as the warps of a block read them: along x in T, so that no lane converts.
template <class T>
struct StagedFootprints {
  struct alignas(16) Centre {
    T mean_x, mean_y, first_x, first_y;
  } centre[chunk];
  struct alignas(16) Shape {
    T scaled_xx, slope, scaled_yy, height;
  } shape[chunk];
  struct alignas(16) Extent {
    T last_x, decay;
    Range y;
    int steep;
  } extent[chunk];

  __device__ void put(int at, const Footprint<T>& f, T mildest) {
    const T scaled_yy = f.p_yy * T(half_log2_e);
    centre[at] = {f.mean_x, f.mean_y, T(f.x.first), T(f.y.first)};
    shape[at] = {f.inverse_xx * T(half_log2_e), f.slope, scaled_yy, f.height};
    extent[at] = {T(f.x.last), exp2_of(-2 * scaled_yy), f.y, is_steep(f, mildest)};
  }
};

// Adds the part of a footprint that meets a tile, in the lane's columns x, x + 1, ...; y is the tile's first row.
template <int lane_columns, class T>
__device__ void add_columns(const StagedFootprints<T>& staged, int at, T x, int y, T first_row,
                            T (&sums)[lane_columns][tile_side]) {
  const auto centre = staged.centre[at];
  const auto extent = staged.extent[at];
  if (x + (lane_columns - 1) < centre.first_x || x > extent.last_x) return;
  // A bit a row.
  const unsigned rows = (0xffu << larger_of(extent.y.first - y, 0)) &
                        (0xffu >> (tile_side - 1 - smaller_of(extent.y.last - y, tile_side - 1)));
  const auto shape = staged.shape[at];
  const T dy = (fmax(first_row, centre.first_y) - centre.first_y) - centre.mean_y;
#pragma unroll
  for (int k = 0; k < lane_columns; ++k) {
    const T dx = (x + k - centre.first_x) - centre.mean_x, scaled_xx = shape.scaled_xx * dx * dx;
    const unsigned mine = x + k >= centre.first_x && x + k <= extent.last_x ? rows : 0;
    T e = shape.slope * dx + dy;
    if (extent.steep) {
#pragma unroll
      for (int row = 0; row < tile_side; ++row) {
        if (!(mine & (1u << row))) continue;
        sums[k][row] += shape.height * start_column(scaled_xx, shape.scaled_yy, e).g;
        e += 1;
      }
      continue;
    }
    Column<T> column = start_column(scaled_xx, shape.scaled_yy, e);
#pragma unroll
    for (int row = 0; row < tile_side; ++row) {
      if (!(mine & (1u << row))) continue;
      sums[k][row] += shape.height * column.g;
      column.g *= column.r;
      column.r *= extent.decay;
    }
  }
}

// The sum of `count` over the threads before this one of a block of draw_threads, and over all of them.
struct Before {
  int mine, total;
};

__device__ inline Before count_before(int count, int* of_warps) {
  const int lane = lane_of_warp(), warp = warp_of_block();
  int inclusive = count;
#pragma unroll
  for (int step = 1; step < warp_lanes; step *= 2) {
    const int other = __shfl_up_sync(all_lanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == warp_lanes - 1) of_warps[warp] = inclusive;
  __syncthreads();
  Before before = {inclusive - count, 0};
#pragma unroll
  for (int other = 0; other < tiles_in_region; ++other) {
    if (other < warp) before.mine += of_warps[other];
    before.total += of_warps[other];
  }
  return before;
}

// Tiles of a region that a footprint meets, a bit each; (x, y) is the region's first pixel.
__device__ inline unsigned tiles_met(Range in_x, Range in_y, int x, int y) {
  unsigned along = 0, met = 0;
#pragma unroll
  for (int tile = 0; tile < tiles_along; ++tile)
    if (in_x.first < x + (tile + 1) * tile_side && in_x.last >= x + tile * tile_side) along |= 1u << tile;
#pragma unroll
  for (int tile = 0; tile < tiles_along; ++tile)
    if (in_y.first < y + (tile + 1) * tile_side && in_y.last >= y + tile * tile_side) met |= along << tile * tiles_along;
  return met;
}

// The footprints of a chunk that a warp's tile meets, in order. Returns their number; `mine` receives their places.
// `tiles` is zero beyond the last, to the end of the chunk.
__device__ inline int pick(const unsigned short* tiles, int count, unsigned char* mine) {
  const unsigned tile = 1u << warp_of_block(), before = (1u << lane_of_warp()) - 1;
  int picked = 0;
#pragma unroll 1
  for (int at = lane_of_warp(); at - lane_of_warp() < count; at += warp_lanes) {
    const bool meets = tiles[at] & tile;
    const unsigned met = __ballot_sync(all_lanes, meets);
    if (meets) mine[picked + __popc(met & before)] = static_cast<unsigned char>(at);
    picked += __popc(met);
  }
  __syncwarp();
  return picked;
}

// Draws region `region` of layer `layer` of images (layers, D, D). footprint_of(g) makes footprints in that layer;
// `bits_layer` is where the rows of bits have it.
template <int lane_columns, class T, class Source>
__device__ void draw_region(const Source& footprint_of, const Bits& bits, Index layer, Index bits_layer, int region,
                            int box, T mildest, T* __restrict__ images) {
  typedef cryosplat::cuda::Sets<lane_columns> Sets;
  __shared__ StagedFootprints<T> staged;
  __shared__ unsigned short tiles[chunk];
  __shared__ int entries[chunk];
  __shared__ int of_warps[tiles_in_region];
  __shared__ unsigned char picked[tiles_in_region][chunk];
  const int thread = int(threadIdx.x), warp = warp_of_block(), set = lane_of_warp() / Sets::lanes;
  const int region_x = region % bits.regions_along * region_side, region_y = region / bits.regions_along * region_side;
  const int tile_x = region_x + warp % tiles_along * tile_side, tile_y = region_y + warp / tiles_along * tile_side;
  const int x = tile_x + lane_of_warp() % Sets::lanes * lane_columns;
  const unsigned* row = bits.words + bits.row(bits_layer, region);
  T sums[lane_columns][tile_side] = {};
  for (int first = 0; first < bits.words_in_row; first += draw_threads) {
    const int word = first + thread;
    unsigned left = word < bits.words_in_row ? row[word] : 0;
    const Before before = count_before(__popc(left), of_warps);
    int rank = before.mine;
    for (int done = 0; done < before.total; done += chunk) {
      const int count = smaller_of(before.total - done, chunk);
      for (; left && rank < done + chunk; left &= left - 1, ++rank)
        entries[rank - done] = word * warp_lanes + __ffs(int(left)) - 1;
      __syncthreads();
      if (thread < count) {
        const Footprint<T> footprint = footprint_of(entries[thread]);
        staged.put(thread, footprint, mildest);
        tiles[thread] = static_cast<unsigned short>(tiles_met(footprint.x, footprint.y, region_x, region_y));
      } else if (thread < chunk) {
        tiles[thread] = 0;
      }
      __syncthreads();
      const int mine = pick(tiles, count, picked[warp]);
      for (int i = set; i < mine; i += Sets::in_warp)
        add_columns(staged, picked[warp][i], T(x), tile_y, T(tile_y), sums);
      __syncthreads();
    }
    if (before.total == 0) __syncthreads();  // of_warps has been read
  }
#pragma unroll
  for (int row = 0; row < tile_side; ++row) {
#pragma unroll
    for (int k = 0; k < lane_columns; ++k) {
      T sum = sums[k][row];
#pragma unroll
      for (int step = Sets::lanes; step < warp_lanes; step *= 2) sum += __shfl_xor_sync(all_lanes, sum, step);
      const int y = tile_y + row;
      if (row % Sets::in_warp == set && x + k < box && y < box) images[(layer * box + y) * box + x + k] = sum;
    }
  }
}

}  // namespace

}  // namespace cuda
}  // namespace cryosplat
