// voxelise on GPUs: each plane of constant z sees a 2D Gaussian (the conditional one), so pixels and gradients are
// summed as in splat, planes in place of views.
#include "../splat.h"

#include "draw.h"
#include "gather.h"
#include "launch.h"

namespace cryosplat {
namespace cuda {

namespace {

using device::Conditional;
using device::Moments3;
using device::solid_gradient;
using device::SolidGradient;

// Planes that share a row of bits: a Gaussian reaches about as many.
constexpr int slab_planes = 8;

// A position as a whole number of pixels and a rest: small numbers keep their digits.
template <class T>
struct Split {
  T whole, rest;
};

template <class T>
__device__ Split<T> split(T mean, T centre) {
  const Pair<T> at = plus(Pair<T>{centre, T(0)}, mean);
  const T whole = rint(at.value);
  return {whole, (at.value - whole) + at.rest};
}

// Where something `away` from such a position is.
template <class T>
__device__ Pair<T> offset(const Split<T>& from, T away) {
  return plus(Pair<T>{from.whole, T(0)}, from.rest + away);
}

// A Gaussian ready to be cut by planes. In the plane dz from its mean its section has the mean slope * dz, and the
// height times exp(-1/2 inverse_variance dz^2); the rest is a Footprint's. Degenerate ones have a height of NaN.
template <class T>
struct alignas(16) Solid {
  Split<T> x, y, z;
  T slope_x, slope_y, inverse_variance;
  T reach_x, reach_y, inverse_xx, slope, p_yy, height;
  Range planes;
};

template <class T>
struct Section {
  Vector2<T> slope;
  T inverse_variance;
  Planar<T> planar;
};

// In Precise what may cancel: the conditional covariance and its determinant.
template <class T, class Precise>
__device__ Section<T> section(const Symmetric3<Precise>& s, bool* is_safe) {
  const Precise inverse_variance = 1 / s.zz, slope_x = s.xz * inverse_variance, slope_y = s.yz * inverse_variance;
  const Symmetric2<Precise> c = {s.xx - s.xz * slope_x, s.xy - s.xz * slope_y, s.yy - s.yz * slope_y};
  *is_safe = c.xx > Precise(thin) * s.xx && c.yy > Precise(thin) * s.yy && !is_thin(c);
  Planar<T> p = planar<T>(c);
  p.is_proper = p.is_proper && s.zz > 0 && s.zz * 0 == 0;
  p.peak *= sqrt(T(inverse_variance) * T(1 / device::two_pi));
  return {{T(slope_x), T(slope_y)}, T(inverse_variance), p};
}

template <class T>
__device__ Solid<T> solid_of(const SplatInputs<T>& in, Index i, int box, T cutoff) {
  const T* c = in.covariances + 6 * i;
  bool is_safe;
  Section<T> s = section<T>(Symmetric3<T>{c[0], c[1], c[2], c[3], c[4], c[5]}, &is_safe);
  if constexpr (sizeof(T) < sizeof(double)) {
    if (!is_safe) s = section<T>(Symmetric3<double>{c[0], c[1], c[2], c[3], c[4], c[5]}, &is_safe);
  }
  const T centre = T(box / 2), height = in.amplitudes[i] * s.planar.peak;
  Solid<T> solid;
  solid.x = split(in.means[3 * i], centre);
  solid.y = split(in.means[3 * i + 1], centre);
  solid.z = split(in.means[3 * i + 2], centre);
  const bool is_finite = (solid.x.whole + solid.y.whole + solid.z.whole + height) * 0 == 0;
  T relative;
  solid.planes = pixels(offset(solid.z, T(0)), cutoff * sqrt(c[5]), box, &relative);
  solid.slope_x = s.slope.x;
  solid.slope_y = s.slope.y;
  solid.inverse_variance = s.inverse_variance;
  solid.reach_x = cutoff * sqrt(s.planar.xx);
  solid.reach_y = cutoff * sqrt(s.planar.yy);
  solid.inverse_xx = s.planar.inverse_xx;
  solid.slope = s.planar.slope;
  solid.p_yy = s.planar.p_yy;
  solid.height = height;
  if (!s.planar.is_proper || !is_finite) {
    solid.height = T(NAN);
    solid.planes = {0, short(box - 1)};
  }
  return solid;
}

// The footprint in plane z, and dz.
template <class T>
__device__ Footprint<T> cut(const Solid<T>& s, int z, int box, T* dz) {
  *dz = (T(z) - s.z.whole) - s.z.rest;
  if (!(s.height == s.height)) return degenerate<T>(box);
  Footprint<T> f;
  f.x = pixels(offset(s.x, s.slope_x * *dz), s.reach_x, box, &f.mean_x);
  f.y = pixels(offset(s.y, s.slope_y * *dz), s.reach_y, box, &f.mean_y);
  f.inverse_xx = s.inverse_xx;
  f.slope = s.slope;
  f.p_yy = s.p_yy;
  f.height = s.height * exp2_of(-s.inverse_variance * *dz * *dz * T(half_log2_e));
  if (z < s.planes.first || z > s.planes.last) f.y = {0, -1};
  return f;
}

// Pixels of an axis between those of the first section and of the last: centres lie on a line.
__device__ inline Range both(Range a, Range b) {
  return {a.first < b.first ? a.first : b.first, a.last > b.last ? a.last : b.last};
}

// Solids (M, G), and rows of bits (M, slabs, regions, words). Blocks: Gaussians, then models.
template <class T>
__global__ void __launch_bounds__(prepare_threads)
    prepare_solids(SplatShape shape, SplatInputs<T> in, T cutoff, Solid<T>* __restrict__ solids, Bits bits) {
  __shared__ AxisBits columns, rows;
  __shared__ unsigned of_slab[words_in_block];
  const Index blocks = pieces(shape.gaussians, prepare_threads);
  const Index model = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const Index g = block * prepare_threads + threadIdx.x;
  const int box = int(shape.box), lane = lane_of_warp(), warp = warp_of_block();
  Range x = {0, -1}, y = {0, -1}, planes = {0, -1};
  if (g < shape.gaussians) {
    const Index i = model * shape.gaussians + g;
    const Solid<T> s = solid_of(in, i, box, cutoff);
    T dz;
    const Footprint<T> first = cut(s, s.planes.first, box, &dz), last = cut(s, s.planes.last, box, &dz);
    planes = s.planes;
    x = both(first.x, last.x);
    y = both(first.y, last.y);
    solids[i] = s;
  }
  if (!bits.words) return;
  columns.set(x, bits.regions_along);
  rows.set(y, bits.regions_along);
  const int slabs = int(pieces(box, slab_planes));
  for (int slab = 0; slab < slabs; ++slab) {
    const bool reaches = planes.first < (slab + 1) * slab_planes && planes.last >= slab * slab_planes;
    const unsigned word = __ballot_sync(all_lanes, reaches && !is_empty(planes));
    __syncthreads();  // the slab before has been written
    if (lane == 0) of_slab[warp] = word;
    __syncthreads();
    write_bits(bits, model * slabs + slab, block, columns, rows, of_slab);
  }
}

// Blocks: regions, then planes, then models.
template <class T>
__global__ void __launch_bounds__(draw_threads, draw_blocks<T>)
    voxelise_draw(Index gaussians, int box, const Solid<T>* __restrict__ solids, Bits bits, T mildest,
                  T* __restrict__ volumes) {
  const Index regions = Index(bits.regions_along) * bits.regions_along, layer = blockIdx.x / regions;
  const Index model = layer / box;
  const int plane = int(layer % box);
  const Solid<T>* of_model = solids + model * gaussians;
  const auto footprint_of = [=](int g) {
    T dz;
    return cut(of_model[g], plane, box, &dz);
  };
  // One column a lane: cutting the sections takes the registers that a second would need.
  draw_region<1>(footprint_of, bits, layer, model * pieces(box, slab_planes) + plane / slab_planes, int(blockIdx.x % regions), box,
              mildest, volumes);
}

// The planes that cut a Gaussian, for `gather`.
template <class T>
struct Planes {
  const Solid<T>& solid;
  const T* grad_volume;
  int box, count;

  __device__ Footprint<T> footprint(int i) const {
    T dz;
    return cut(solid, solid.planes.first + i, box, &dz);
  }

  __device__ const T* residual(int i) const { return grad_volume + Index(solid.planes.first + i) * box * box; }

  // In the order of Moments3.
  __device__ void add(bool is_there, int i, const Moments2<T>& m, GatherMemory<T>& memory) const {
    if (!is_there) return;
    const T dz = (T(solid.planes.first + i) - solid.z.whole) - solid.z.rest;
    // Of unit height; planes of a degenerate Gaussian get its NaN.
    const T g = exp2_of(-solid.inverse_variance * dz * dz * T(half_log2_e)) + (solid.height - solid.height);
    const T z = dz * g;
    const T all[sums_in_lane] = {g * m.one, g * m.x,   g * m.y,        g * m.xx, g * m.xy,
                                 g * m.yy,  z * m.one, dz * z * m.one, z * m.x,  z * m.y};
#pragma unroll
    for (int k = 0; k < sums_in_lane; ++k) memory.add(k, all[k]);
  }
};

// Blocks: Gaussians, then models.
template <class T, bool is_aligned>
__global__ void __launch_bounds__(gather_threads, (gather_blocks<T, false, is_aligned>))
    voxelise_gather(SplatShape shape, SplatInputs<T> in, const Solid<T>* __restrict__ solids, T mildest,
                    const T* __restrict__ grad_volumes, SplatGradients<T> out) {
  __shared__ GatherMemory<T> memory;
  const Index blocks = pieces(shape.gaussians, groups_in_block);
  const Index model = blockIdx.x / blocks;
  const Index g = blockIdx.x % blocks * groups_in_block + group_of_block();
  const bool is_gaussian = g < shape.gaussians;
  const Index at = model * shape.gaussians + (is_gaussian ? g : 0), box = shape.box;
  const Solid<T>& solid = solids[at];
  const int count = is_gaussian ? solid.planes.last - solid.planes.first + 1 : 0;
  const Planes<T> planes = {solid, grad_volumes + model * box * box * box, int(box), count};
  gather<is_aligned>(planes, int(box), mildest, memory);
  const T unit = sqrt(solid.inverse_xx * solid.p_yy * solid.inverse_variance) *
                 T(1 / (device::two_pi * 2.50662827463100050242));  // (2 pi)^(3/2)
  T t[sums_in_lane];
  for (int k = 0; k < sums_in_lane; ++k) t[k] = unit * memory.total(k);
  const Moments3<T> m = {{t[0], t[1], t[2], t[3], t[4], t[5]}, t[6], t[7], {t[8], t[9]}};
  if (!is_gaussian || lane_of_group() != 0) return;
  Conditional<T> k;
  k.slope = {solid.slope_x, solid.slope_y};
  k.inverse_variance = solid.inverse_variance;
  const T amplitude = in.amplitudes[at], along_e = amplitude * solid.p_yy * m.planar_z.y;
  const SolidGradient<T> gradient = solid_gradient(
      gradient_of_moments(m.planar, solid.inverse_xx, solid.slope, solid.p_yy, amplitude),
      Vector2<T>{amplitude * solid.inverse_xx * m.planar_z.x + solid.slope * along_e, along_e}, m, k, amplitude);
  // A degenerate Gaussian that no plane showed, or whose numbers cancel it, is one all the same.
  const T poison = solid.height - solid.height;
  T* mean = out.means + 3 * at;
  T* covariance = out.covariances + 6 * at;
  const Symmetric3<T>& c = gradient.covariance;
  mean[0] = gradient.mean.x + poison;
  mean[1] = gradient.mean.y + poison;
  mean[2] = gradient.mean.z + poison;
  covariance[0] = c.xx + poison;
  covariance[1] = c.xy + poison;
  covariance[2] = c.xz + poison;
  covariance[3] = c.yy + poison;
  covariance[4] = c.yz + poison;
  covariance[5] = c.zz + poison;
  out.amplitudes[at] = gradient.amplitude + poison;
}

template <class T>
struct SolidPlaces {
  Solid<T>* solids;
  Bits bits;
  Index bytes;

  SolidPlaces(const SplatShape& shape, bool draws, void* workspace) {
    Places places(workspace);
    bits = bits_of(shape.gaussians, shape.box);
    solids = places.next<Solid<T>>(shape.models * shape.gaussians);
    if (draws) bits.words = places.next<unsigned>(count_words(bits, shape.models * pieces(shape.box, slab_planes)));
    bytes = places.bytes();
  }
};

template <class T>
const char* prepare(const SplatShape& shape, const SplatInputs<T>& in, double cutoff, const SolidPlaces<T>& at,
                    const Stream& stream) {
  const Index blocks = pieces(shape.gaussians, prepare_threads) * shape.models;
  if (blocks == 0) return nullptr;
  return launch(prepare_solids<T>, dim3(unsigned(blocks)), dim3(prepare_threads), stream, shape, in, T(cutoff),
                at.solids, at.bits);
}

}  // namespace

template <class Scalar>
std::int64_t voxelise_forward_bytes(const SplatShape& shape) {
  return SolidPlaces<Scalar>(shape, true, nullptr).bytes;
}

template <class Scalar>
const char* voxelise_forward(const SplatShape& shape, const SplatInputs<Scalar>& in, double cutoff, Scalar* volumes,
                             void* workspace, const Stream& stream) {
  if (shape.models == 0) return nullptr;
  const SolidPlaces<Scalar> at(shape, true, workspace);
  if (const char* message = prepare(shape, in, cutoff, at, stream)) return message;
  const Index blocks = shape.models * shape.box * at.bits.regions_along * at.bits.regions_along;
  return launch(voxelise_draw<Scalar>, dim3(unsigned(blocks)), dim3(draw_threads), stream, shape.gaussians,
                int(shape.box), static_cast<const Solid<Scalar>*>(at.solids), at.bits,
                Scalar(mildest_correlation(cutoff)), volumes);
}

template <class Scalar>
std::int64_t voxelise_backward_bytes(const SplatShape& shape) {
  return SolidPlaces<Scalar>(shape, false, nullptr).bytes;
}

template <class Scalar>
const char* voxelise_backward(const SplatShape& shape, const SplatInputs<Scalar>& in, double cutoff,
                              const Scalar* grad_volumes, const SplatGradients<Scalar>& out, void* workspace,
                              const Stream& stream) {
  const Index blocks = pieces(shape.gaussians, groups_in_block) * shape.models;
  if (blocks == 0) return nullptr;
  const SolidPlaces<Scalar> at(shape, false, workspace);
  if (const char* message = prepare(shape, in, cutoff, at, stream)) return message;
  const bool aligned = are_rows_aligned(grad_volumes, shape.box);
  return launch(aligned ? voxelise_gather<Scalar, true> : voxelise_gather<Scalar, false>, dim3(unsigned(blocks)), dim3(gather_threads), stream, shape, in,
                static_cast<const Solid<Scalar>*>(at.solids), Scalar(mildest_correlation(cutoff)), grad_volumes, out);
}

#define CRYOSPLAT_INSTANTIATE(Scalar)                                                                              \
  template std::int64_t voxelise_forward_bytes<Scalar>(const SplatShape&);                                         \
  template const char* voxelise_forward(const SplatShape&, const SplatInputs<Scalar>&, double, Scalar*, void*,     \
                                        const Stream&);                                                            \
  template std::int64_t voxelise_backward_bytes<Scalar>(const SplatShape&);                                        \
  template const char* voxelise_backward(const SplatShape&, const SplatInputs<Scalar>&, double, const Scalar*,     \
                                         const SplatGradients<Scalar>&, void*, const Stream&)
CRYOSPLAT_INSTANTIATE(float);
CRYOSPLAT_INSTANTIATE(double);
#undef CRYOSPLAT_INSTANTIATE

}  // namespace cuda
}  // namespace cryosplat
