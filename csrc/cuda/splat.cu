// splat on GPUs. The contract stands in splat.h; how pixels are summed in draw.h, and how gradients are in gather.h.
#include "../splat.h"

#include "draw.h"
#include "gather.h"
#include "launch.h"

namespace cryosplat {
namespace cuda {

namespace {

using device::ViewRows;

// Numbers of a Gaussian: mean (3), covariance (6), amplitude. Of a pose: two rows of the rotation, shift.
constexpr int parameters = 10, pose_numbers = 8;

template <class T>
__device__ ViewRows<T> view_rows(const SplatInputs<T>& in, Index view) {
  const T* r = in.rotations + 9 * view;
  return {{r[0], r[1], r[2]}, {r[3], r[4], r[5]}};
}

template <class T>
__device__ Vector3<T> mean_of(const SplatInputs<T>& in, Index i) {
  return {in.means[3 * i], in.means[3 * i + 1], in.means[3 * i + 2]};
}

template <class T>
__device__ Symmetric3<T> covariance_of(const SplatInputs<T>& in, Index i) {
  const T* s = in.covariances + 6 * i;
  return {s[0], s[1], s[2], s[3], s[4], s[5]};
}

__device__ inline Vector3<double> in_double(const Vector3<float>& v) { return {v.x, v.y, v.z}; }

template <class T>
__device__ Planar<T> projected(const Symmetric3<T>& s, const ViewRows<T>& rows) {
  const Symmetric2<T> c = project(s, rows).c;
  if constexpr (sizeof(T) < sizeof(double)) {
    if (is_thin(c)) {
      const Symmetric3<double> precise = {s.xx, s.xy, s.xz, s.yy, s.yz, s.zz};
      return planar<T>(project(precise, ViewRows<double>{in_double(rows.x), in_double(rows.y)}).c);
    }
  }
  return planar<T>(c);
}

// Gaussian i of the mixtures, as a view shows it.
template <class T>
__device__ Footprint<T> footprint_in_view(const SplatInputs<T>& in, Index i, Index view, int box, T cutoff) {
  const ViewRows<T> rows = view_rows(in, view);
  const Vector3<T> mu = mean_of(in, i);
  const Planar<T> p = projected(covariance_of(in, i), rows);
  const T centre = T(box / 2), height = in.amplitudes[i] * p.peak;
  const Pair<T> x = position(rows.x, mu, centre, -in.shifts[2 * view]);
  const Pair<T> y = position(rows.y, mu, centre, -in.shifts[2 * view + 1]);
  if (!p.is_proper || !((x.value + y.value + height) * 0 == 0)) return degenerate<T>(box);
  Footprint<T> f;
  f.x = pixels(x, cutoff * sqrt(p.xx), box, &f.mean_x);
  f.y = pixels(y, cutoff * sqrt(p.yy), box, &f.mean_y);
  f.inverse_xx = p.inverse_xx;
  f.slope = p.slope;
  f.p_yy = p.p_yy;
  f.height = height;
  return f;
}

// Footprints (V, G), and rows of bits (V, regions, words) unless these are null. Blocks: Gaussians, then views.
template <class T>
__global__ void __launch_bounds__(prepare_threads)
    prepare_views(SplatShape shape, SplatInputs<T> in, T cutoff, Footprint<T>* __restrict__ footprints, Bits bits) {
  __shared__ AxisBits columns, rows;
  __shared__ unsigned everywhere[words_in_block];
  const Index blocks = pieces(shape.gaussians, prepare_threads);
  const Index view = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const Index g = block * prepare_threads + threadIdx.x, model = in.model[view];
  const int box = int(shape.box);
  Footprint<T> f = {};
  f.x = f.y = {0, -1};
  if (g < shape.gaussians) {
    const bool is_model = model >= 0 && model < shape.models;
    f = is_model ? footprint_in_view(in, model * shape.gaussians + g, view, box, cutoff) : degenerate<T>(box);
    footprints[view * shape.gaussians + g] = f;
  }
  if (!bits.words) return;
  columns.set(f.x, bits.regions_along);
  rows.set(f.y, bits.regions_along);
  if (threadIdx.x < words_in_block) everywhere[threadIdx.x] = all_lanes;
  __syncthreads();
  write_bits(bits, view, block, columns, rows, everywhere);
}

// Blocks: regions, then views.
template <class T>
__global__ void __launch_bounds__(draw_threads, draw_blocks<T>)
    splat_draw(Index gaussians, int box, const Footprint<T>* __restrict__ footprints, Bits bits, T mildest,
               T* __restrict__ images) {
  const Index regions = Index(bits.regions_along) * bits.regions_along, view = blockIdx.x / regions;
  const Footprint<T>* of_view = footprints + view * gaussians;
  const auto footprint_of = [=](int g) { return of_view[g]; };
  draw_region<2>(footprint_of, bits, view, view, int(blockIdx.x % regions), box, mildest, images);
}

// The views of one model in a chunk of them, in order: a block's.
struct ViewList {
  int views[gather_threads];
  int count;
};

// Called by the whole block; the list is whole after a barrier, which is here.
__device__ inline void list_views(const std::int64_t* model_of, int model, Index first, Index last, ViewList* list) {
  __shared__ int of_warps[gather_threads / warp_lanes];
  const int lane = lane_of_warp(), warp = warp_of_block();
  const Index view = first + threadIdx.x;
  const bool shows = view < last && model_of[view] == model;
  const unsigned shown = __ballot_sync(all_lanes, shows);
  if (lane == 0) of_warps[warp] = __popc(shown);
  __syncthreads();
  int before = 0, total = 0;
  for (int other = 0; other < gather_threads / warp_lanes; ++other) {
    if (other < warp) before += of_warps[other];
    total += of_warps[other];
  }
  if (shows) list->views[before + __popc(shown & ((1u << lane) - 1))] = int(view);
  if (threadIdx.x == 0) list->count = total;
  __syncthreads();
}

// The views that show a Gaussian, for `gather`.
template <class T, bool poses>
struct Views {
  const SplatShape& shape;
  const SplatInputs<T>& in;
  const Footprint<T>* footprints;
  const T* grad_images;
  const ViewList& list;
  Index model, g;
  T* of_warp;         // pose sums of this warp, view by view
  Index warp_stride;  // between those of two views
  int count;

  __device__ bool is_gaussian() const { return g < shape.gaussians; }

  __device__ Footprint<T> footprint(int i) const {
    if (is_gaussian()) return footprints[list.views[i] * shape.gaussians + g];
    Footprint<T> none = {};
    none.x = none.y = {0, -1};
    return none;
  }

  __device__ const T* residual(int i) const { return grad_images + list.views[i] * shape.box * shape.box; }

  __device__ void add(bool is_there, int i, const Moments2<T>& m, GatherMemory<T>& memory) const {
    T of_pose[pose_numbers] = {};
    if (is_there && is_gaussian()) add_view(i, m, memory, of_pose);
    if constexpr (poses) {
#pragma unroll
      for (int k = 0; k < pose_numbers; ++k) {
        const T total = sum_over_groups(of_pose[k]);
        if (is_there && lane_of_warp() < group_lanes) of_warp[list.views[i] * warp_stride + k] = total;
      }
    }
  }

  __device__ void add_view(int i, const Moments2<T>& m, GatherMemory<T>& memory, T (&of_pose)[pose_numbers]) const {
    const Footprint<T> f = footprint(i);  // again: kept, it would take registers from the walk
    const Index view = list.views[i];
    const ViewRows<T> rows = view_rows(in, view);
    const Index at = model * shape.gaussians + g;
    // The peak of unit amplitude; NaN for a degenerate Gaussian, whose height is.
    const T peak = sqrt(f.inverse_xx * f.p_yy) * T(1 / device::two_pi) + (f.height - f.height);
    const PlanarGradient<T> gradient = gradient_of_moments(
        Moments2<T>{peak * m.one, peak * m.x, peak * m.y, peak * m.xx, peak * m.xy, peak * m.yy}, f.inverse_xx, f.slope,
        f.p_yy, in.amplitudes[at]);
    const Vector3<T> mean = mean_gradient(gradient, rows);
    const Symmetric3<T> s = covariance_gradient(gradient, rows);
    const T all[parameters] = {mean.x, mean.y, mean.z, s.xx, s.xy, s.xz, s.yy, s.yz, s.zz, gradient.amplitude};
#pragma unroll
    for (int k = 0; k < parameters; ++k) memory.add(k, all[k]);
    if constexpr (poses) {
      const ViewRows<T> r = rotation_gradient(gradient, project(covariance_of(in, at), rows), mean_of(in, at));
      const T pose[pose_numbers] = {r.x.x, r.x.y, r.x.z, r.y.x, r.y.y, r.y.z, -gradient.mean.x, -gradient.mean.y};
#pragma unroll
      for (int k = 0; k < pose_numbers; ++k) of_pose[k] = pose[k];
    }
  }
};

// How the work of a backward pass is divided. Where there are few Gaussians, views are dealt to several blocks.
struct Division {
  Index blocks;  // of Gaussians, of one model
  Index chunks, views_in_chunk;
};

constexpr Index wanted_blocks = 1024;  // some 8 for each of the 132 multiprocessors of an H100

inline Division divide(const SplatShape& shape) {
  const Index blocks = pieces(shape.gaussians, groups_in_block);
  // Not below a group's worth of views, and not above what a block lists.
  const Index wanted = pieces(wanted_blocks, blocks * shape.models > 0 ? blocks * shape.models : 1);
  const Index most = pieces(shape.views, 2 * group_lanes), least = pieces(shape.views, gather_threads);
  Index chunks = wanted < most ? wanted : most;
  if (chunks < least) chunks = least;
  if (chunks < 1) chunks = 1;
  return {blocks, chunks, pieces(shape.views, chunks)};
}

// Sums over the views of a chunk (chunks, M, G, parameters), or the gradients themselves where there is one chunk; and
// sums of poses (V, blocks x warps, pose_numbers). Blocks: Gaussians, then models, then chunks.
template <class T, bool poses, bool is_aligned>
__global__ void __launch_bounds__(gather_threads, (gather_blocks<T, poses, is_aligned>))
    splat_gather(SplatShape shape, SplatInputs<T> in, Division division, const Footprint<T>* __restrict__ footprints,
                 T mildest, const T* __restrict__ grad_images, SplatGradients<T> out, T* __restrict__ of_chunks,
                 T* __restrict__ of_poses) {
  static_assert(parameters == sums_in_lane, "a sum for each");
  __shared__ ViewList list;
  __shared__ GatherMemory<T> memory;
  const Index block = blockIdx.x % division.blocks, rest = blockIdx.x / division.blocks;
  const Index model = rest % shape.models, piece = rest / shape.models, first = piece * division.views_in_chunk;
  const Index last = first + division.views_in_chunk < shape.views ? first + division.views_in_chunk : shape.views;
  list_views(in.model, int(model), first, last, &list);
  constexpr int warps = gather_threads / warp_lanes;
  const Index warp = block * warps + warp_of_block();
  const Views<T, poses> views = {shape,
                                 in,
                                 footprints,
                                 grad_images,
                                 list,
                                 model,
                                 block * groups_in_block + group_of_block(),
                                 of_poses + warp * pose_numbers,
                                 division.blocks * warps * pose_numbers,
                                 list.count};
  gather<is_aligned>(views, int(shape.box), mildest, memory);
  const Index at = model * shape.gaussians + views.g;
#pragma unroll
  for (int k = 0; k < parameters; ++k) {
    const T total = memory.total(k);
    if (!views.is_gaussian() || lane_of_group() != k % group_lanes) continue;
    T* to = division.chunks > 1 ? of_chunks + ((piece * shape.models * shape.gaussians + at) * parameters + k)
            : k < 3             ? out.means + 3 * at + k
            : k < 9             ? out.covariances + 6 * at + (k - 3)
                                : out.amplitudes + at;
    *to = total;
  }
}

// The gradients from their parts. Threads: a number each.
template <class T>
__global__ void __launch_bounds__(prepare_threads)
    sum_chunks(Index count, Index chunks, const T* __restrict__ of_chunks, SplatGradients<T> out) {
  const Index i = Index(blockIdx.x) * prepare_threads + threadIdx.x;
  if (i >= count) return;
  T sum = 0;
  for (Index piece = 0; piece < chunks; ++piece) sum += of_chunks[piece * count + i];
  const Index at = i / parameters;
  const int k = int(i % parameters);
  T* to = k < 3 ? out.means + 3 * at + k : k < 9 ? out.covariances + 6 * at + (k - 3) : out.amplitudes + at;
  *to = sum;
}

// Pose gradients from the sums of warps. Blocks: a view each, of one warp.
template <class T>
__global__ void __launch_bounds__(warp_lanes)
    sum_poses(Index warps, const T* __restrict__ of_poses, T* __restrict__ rotations, T* __restrict__ shifts) {
  const Index view = blockIdx.x;
  const int lane = int(threadIdx.x), number = lane % pose_numbers;
  T sum = 0;
  for (Index warp = lane / pose_numbers; warp < warps; warp += warp_lanes / pose_numbers)
    sum += of_poses[(view * warps + warp) * pose_numbers + number];
#pragma unroll
  for (int step = pose_numbers; step < warp_lanes; step *= 2) sum += __shfl_xor_sync(all_lanes, sum, step);
  if (lane < 6) rotations[9 * view + lane] = sum;
  if (lane == 6 || lane == 7) shifts[2 * view + lane - 6] = sum;
  if (lane >= 8 && lane < 11) rotations[9 * view + lane - 2] = 0;  // the third row
}

template <class T>
struct ForwardPlaces {
  Footprint<T>* footprints;
  Bits bits;
  Index bytes;

  ForwardPlaces(const SplatShape& shape, void* workspace) {
    Places places(workspace);
    bits = bits_of(shape.gaussians, shape.box);
    footprints = places.next<Footprint<T>>(shape.views * shape.gaussians);
    bits.words = places.next<unsigned>(count_words(bits, shape.views));
    bytes = places.bytes();
  }
};

template <class T>
struct BackwardPlaces {
  Footprint<T>* footprints;
  T *of_chunks, *of_poses;
  Index bytes;

  BackwardPlaces(const SplatShape& shape, bool poses, void* workspace) {
    const Division division = divide(shape);
    Places places(workspace);
    footprints = places.next<Footprint<T>>(shape.views * shape.gaussians);
    of_chunks = places.next<T>(division.chunks > 1 ? division.chunks * shape.models * shape.gaussians * parameters : 0);
    of_poses = places.next<T>(poses ? shape.views * division.blocks * (gather_threads / warp_lanes) * pose_numbers : 0);
    bytes = places.bytes();
  }
};

template <class T>
const char* prepare(const SplatShape& shape, const SplatInputs<T>& in, double cutoff, Footprint<T>* footprints,
                    const Bits& bits, const Stream& stream) {
  const Index blocks = pieces(shape.gaussians, prepare_threads) * shape.views;
  if (blocks == 0) return nullptr;
  return launch(prepare_views<T>, dim3(unsigned(blocks)), dim3(prepare_threads), stream, shape, in, T(cutoff),
                footprints, bits);
}

}  // namespace

template <class Scalar>
std::int64_t splat_forward_bytes(const SplatShape& shape) {
  return ForwardPlaces<Scalar>(shape, nullptr).bytes;
}

template <class Scalar>
const char* splat_forward(const SplatShape& shape, const SplatInputs<Scalar>& in, double cutoff, Scalar* images,
                          void* workspace, const Stream& stream) {
  if (shape.views == 0) return nullptr;
  const ForwardPlaces<Scalar> at(shape, workspace);
  if (const char* message = prepare(shape, in, cutoff, at.footprints, at.bits, stream)) return message;
  const Index blocks = shape.views * at.bits.regions_along * at.bits.regions_along;
  return launch(splat_draw<Scalar>, dim3(unsigned(blocks)), dim3(draw_threads), stream, shape.gaussians, int(shape.box),
                static_cast<const Footprint<Scalar>*>(at.footprints), at.bits, Scalar(mildest_correlation(cutoff)),
                images);
}

template <class Scalar>
std::int64_t splat_backward_bytes(const SplatShape& shape, bool poses) {
  return BackwardPlaces<Scalar>(shape, poses, nullptr).bytes;
}

template <class Scalar>
const char* splat_backward(const SplatShape& shape, const SplatInputs<Scalar>& in, double cutoff,
                           const Scalar* grad_images, const SplatGradients<Scalar>& out, void* workspace,
                           const Stream& stream) {
  const bool poses = out.rotations != nullptr;
  const Division division = divide(shape);
  const BackwardPlaces<Scalar> at(shape, poses, workspace);
  const Index blocks = division.blocks * shape.models * division.chunks;
  const Footprint<Scalar>* footprints = at.footprints;
  if (const char* message = prepare(shape, in, cutoff, at.footprints, Bits{}, stream)) return message;
  if (blocks > 0) {
    const bool aligned = are_rows_aligned(grad_images, shape.box);
    const char* message = launch(poses ? aligned ? splat_gather<Scalar, true, true> : splat_gather<Scalar, true, false>
                                 : aligned ? splat_gather<Scalar, false, true>
                                           : splat_gather<Scalar, false, false>,
                                 dim3(unsigned(blocks)), dim3(gather_threads), stream, shape, in, division, footprints,
                                 Scalar(mildest_correlation(cutoff)), grad_images, out, at.of_chunks, at.of_poses);
    if (message) return message;
  }
  if (blocks > 0 && division.chunks > 1) {
    const Index count = shape.models * shape.gaussians * parameters;
    const char* message =
        launch(sum_chunks<Scalar>, dim3(unsigned(pieces(count, prepare_threads))), dim3(prepare_threads), stream, count,
               division.chunks, static_cast<const Scalar*>(at.of_chunks), out);
    if (message) return message;
  }
  if (!poses || shape.views == 0) return nullptr;
  return launch(sum_poses<Scalar>, dim3(unsigned(shape.views)), dim3(warp_lanes), stream,
                division.blocks * (gather_threads / warp_lanes), static_cast<const Scalar*>(at.of_poses), out.rotations,
                out.shifts);
}

#define CRYOSPLAT_INSTANTIATE(Scalar)                                                                              \
  template std::int64_t splat_forward_bytes<Scalar>(const SplatShape&);                                            \
  template const char* splat_forward(const SplatShape&, const SplatInputs<Scalar>&, double, Scalar*, void*,        \
                                     const Stream&);                                                               \
  template std::int64_t splat_backward_bytes<Scalar>(const SplatShape&, bool);                                     \
  template const char* splat_backward(const SplatShape&, const SplatInputs<Scalar>&, double, const Scalar*,        \
                                      const SplatGradients<Scalar>&, void*, const Stream&)
CRYOSPLAT_INSTANTIATE(float);
CRYOSPLAT_INSTANTIATE(double);
#undef CRYOSPLAT_INSTANTIATE

}  // namespace cuda
}  // namespace cryosplat
