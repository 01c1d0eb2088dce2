// voxelise on CPUs: each plane of constant z sees a 2D Gaussian (the conditional
// one), so the inner loop is splat's. Forward by slabs of planes, backward by
// blocks of Gaussians.
#pragma once

#include "splat_kernels.h"

namespace cryosplat {
namespace CRYOSPLAT_ISA {

constexpr std::int64_t slab_planes = 8;

// One Gaussian, ready to be cut by planes.
struct Solid {
  double mean_x, mean_y, mean_z;  // pixels of the grid
  double reach_x, reach_y;        // cut-off in a plane
  Conditional<double> k;
  double amplitude;
  double decay;
  int z0, z1;
  bool steep;
};

struct SolidPacket {
  Conditional<Packet> k;
  Packet amplitude, poison{};
  Solid solid[packet];
  bool proper = true;

  SolidPacket(const Mixtures& mixtures, std::int64_t model, std::int64_t first, std::int64_t box, double cutoff) {
    const Vector3<Packet> mu = mixtures.mean(model, first);
    const Symmetric3<Packet> s = mixtures.covariance(model, first);
    amplitude = mixtures.amplitude(model, first);
    k.inverse_variance = 1.0 / s.zz;
    k.slope = {s.xz * k.inverse_variance, s.yz * k.inverse_variance};
    k.c = {s.xx - s.xz * k.slope.x, s.xy - s.xz * k.slope.y, s.yy - s.yz * k.slope.y};
    const Packet det = determinant(k.c), zero{};
    k.p = inverse(k.c, det);
    k.norm = 1.0 / (square_root(det * s.zz) * std::sqrt(two_pi * two_pi * two_pi));
    const double centre = static_cast<double>(box / 2);
    const Packet reach_x = square_root(k.c.xx) * cutoff, reach_y = square_root(k.c.yy) * cutoff;
    const PixelRange zs = pixel_range(mu.z + centre, square_root(s.zz) * cutoff, box);
    const auto usable = is_proper(k.c, det, mu.x + mu.z, mu.y, amplitude) & (s.zz > zero) & (s.zz * 0.0 == zero);
    const Packet decay = exponential<double>(-k.p.yy);
    const auto steep = is_steep(k.c.xx, k.c.xy, k.c.yy, cutoff);
    for (int i = 0; i < packet; ++i) {
      const bool real = first + i < mixtures.gaussians();
      if (real && !usable[i]) {
        poison[i] = NAN;
        proper = false;
      }
      solid[i] = {mu.x[i] + centre,
                  mu.y[i] + centre,
                  mu.z[i] + centre,
                  reach_x[i],
                  reach_y[i],
                  {{k.slope.x[i], k.slope.y[i]},
                   {k.c.xx[i], k.c.xy[i], k.c.yy[i]},
                   {k.p.xx[i], k.p.xy[i], k.p.yy[i]},
                   k.inverse_variance[i],
                   k.norm[i]},
                  amplitude[i],
                  decay[i],
                  zs.first[i],
                  real && usable[i] ? zs.last[i] : -1,
                  static_cast<bool>(steep[i])};
    }
  }
};

inline int first_pixel(double low, std::int64_t box) {
  return low <= 0 ? 0 : (low >= box ? static_cast<int>(box) : static_cast<int>(std::ceil(low)));
}

inline int last_pixel(double high, std::int64_t box) {
  return high < 0 ? -1 : (high >= box ? static_cast<int>(box) - 1 : static_cast<int>(std::floor(high)));
}

// The footprint in plane z and the peak there, of unit amplitude; false if there is none.
template <class Scalar>
bool cut(const Solid& s, int z, std::int64_t box, Footprint<Scalar>& f, double& peak) {
  const double dz = z - s.mean_z;
  const double x = s.mean_x + s.k.slope.x * dz, y = s.mean_y + s.k.slope.y * dz;
  f.x0 = first_pixel(x - s.reach_x, box);
  f.x1 = last_pixel(x + s.reach_x, box);
  f.y0 = first_pixel(y - s.reach_y, box);
  f.y1 = last_pixel(y + s.reach_y, box);
  if (f.x1 < f.x0 || f.y1 < f.y0) return false;
  f.mean_x = static_cast<Scalar>(x - f.x0);
  f.mean_y = static_cast<Scalar>(y - f.y0);
  f.inverse_xx = static_cast<Scalar>(1.0 / s.k.c.xx);
  f.slope = static_cast<Scalar>(-s.k.c.xy / s.k.c.xx);
  f.p_yy = static_cast<Scalar>(s.k.p.yy);
  f.decay = static_cast<Scalar>(s.decay);
  peak = s.k.norm * std::exp(-0.5 * dz * dz * s.k.inverse_variance);
  f.steep = s.steep;
  return true;
}

template <class Scalar>
void draw_slab(const Mixtures& mixtures, std::int64_t model, std::int64_t box, double cutoff, int z_begin, int z_end,
               Scalar* volume, std::int64_t stride) {
  const std::int64_t plane = box * stride;
  std::memset(volume + z_begin * plane, 0, (z_end - z_begin) * plane * sizeof(Scalar));
  bool proper = true;
  Footprint<Scalar> f;
  double peak;
  for (std::int64_t first = 0; first < mixtures.gaussians(); first += packet) {
    const SolidPacket p(mixtures, model, first, box, cutoff);
    proper &= p.proper;
    for (const Solid& s : p.solid) {
      const int begin = s.z0 > z_begin ? s.z0 : z_begin, end = s.z1 + 1 < z_end ? s.z1 + 1 : z_end;
      for (int z = begin; z < end; ++z) {
        if (!cut(s, z, box, f, peak)) continue;
        Adder<Scalar> adder{volume + z * plane, stride, static_cast<Scalar>(s.amplitude * peak)};
        walk(f, columns_from(f, f.x0, static_cast<int>(stride)), static_cast<int>(stride), 0, static_cast<int>(box), adder);
      }
    }
  }
  if (!proper)
    for (std::int64_t i = z_begin * plane; i < z_end * plane; ++i) volume[i] = static_cast<Scalar>(NAN);
}

template <class Scalar>
void voxelise_forward(const SplatShape& shape, const SplatInputs<Scalar>& in, double cutoff, Scalar* volumes,
                      int threads) {
  const Mixtures mixtures(shape, in);
  const std::int64_t box = shape.box, stride = row_stride<Scalar>(box), slabs = (box + slab_planes - 1) / slab_planes;
  const bool widened = stride != box;
  Buffer<Scalar> scratch(widened ? shape.models * box * box * stride : 0);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t task = 0; task < shape.models * slabs; ++task) {
    const std::int64_t model = task / slabs, begin = task % slabs * slab_planes;
    const std::int64_t end = begin + slab_planes < box ? begin + slab_planes : box;
    Scalar* volume = widened ? scratch.get() + model * box * box * stride : volumes + model * box * box * box;
    draw_slab(mixtures, model, box, cutoff, static_cast<int>(begin), static_cast<int>(end), volume, stride);
    if (widened)
      copy_rows(volume + begin * box * stride, stride, volumes + (model * box + begin) * box * box, box,
                (end - begin) * box, box);
  }
}

// Moments of one Gaussian over all its planes.
template <class Scalar>
Moments3<double> solid_moments(const Solid& s, const Scalar* residual, std::int64_t box, std::int64_t stride) {
  Moments3<double> m{};
  Footprint<Scalar> f;
  double peak;
  for (int z = s.z0; z <= s.z1; ++z) {
    if (!cut(s, z, box, f, peak)) continue;
    MomentSummer<Scalar> summer{residual + z * box * stride, stride};
    walk(f, columns_from(f, f.x0, static_cast<int>(stride)), static_cast<int>(stride), 0, static_cast<int>(box), summer);
    const Moments2<Scalar> t = summer.moments();
    const double dz = z - s.mean_z;
    m.planar = {m.planar.one + peak * t.one, m.planar.x + peak * t.x,   m.planar.y + peak * t.y,
                m.planar.xx + peak * t.xx,   m.planar.xy + peak * t.xy, m.planar.yy + peak * t.yy};
    m.z += dz * peak * t.one;
    m.zz += dz * dz * peak * t.one;
    m.planar_z = {m.planar_z.x + dz * peak * t.x, m.planar_z.y + dz * peak * t.y};
  }
  return m;
}

template <class Scalar>
void gather_solid_packet(const Mixtures& mixtures, std::int64_t model, std::int64_t first, std::int64_t box,
                         double cutoff, const Scalar* residual, std::int64_t stride, std::int64_t in_block,
                         BlockSums& sums) {
  const SolidPacket p(mixtures, model, first, box, cutoff);
  Moments3<Packet> m{};
  for (int i = 0; i < packet; ++i) {
    const Moments3<double> t = solid_moments(p.solid[i], residual, box, stride);
    m.planar.one[i] = t.planar.one, m.planar.x[i] = t.planar.x, m.planar.y[i] = t.planar.y;
    m.planar.xx[i] = t.planar.xx, m.planar.xy[i] = t.planar.xy, m.planar.yy[i] = t.planar.yy;
    m.z[i] = t.z, m.zz[i] = t.zz, m.planar_z.x[i] = t.planar_z.x, m.planar_z.y[i] = t.planar_z.y;
  }
  m.planar.one += p.poison;
  const SolidGradient<Packet> g = solid_gradient(m, p.k, p.amplitude);
  const Packet all[parameters] = {g.mean.x,        g.mean.y,        g.mean.z,        g.covariance.xx, g.covariance.xy,
                                  g.covariance.xz, g.covariance.yy, g.covariance.yz, g.covariance.zz, g.amplitude};
  for (int k = 0; k < parameters; ++k) store(sums.gaussian[k] + in_block, all[k] + p.poison);
}

template <class Scalar>
void voxelise_backward(const SplatShape& shape, const SplatInputs<Scalar>& in, double cutoff,
                       const Scalar* grad_volumes, const SplatGradients<Scalar>& out, int threads) {
  const Mixtures mixtures(shape, in);
  const std::int64_t box = shape.box, stride = row_stride<Scalar>(box), voxels = box * box * stride;
  const bool widened = stride != box;
  Buffer<Scalar> scratch(widened ? shape.models * voxels : 0);
  if (widened) copy_rows(grad_volumes, box, scratch.get(), stride, shape.models * box * box, box);
  const Scalar* residuals = widened ? scratch.get() : grad_volumes;

  const std::int64_t blocks = (shape.gaussians + block_gaussians - 1) / block_gaussians;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t task = 0; task < shape.models * blocks; ++task) {
    const std::int64_t model = task / blocks, begin = task % blocks * block_gaussians;
    const std::int64_t left = shape.gaussians - begin, count = left < block_gaussians ? left : block_gaussians;
    BlockSums sums{};
    for (std::int64_t i = 0; i < count; i += packet)
      gather_solid_packet(mixtures, model, begin + i, box, cutoff, residuals + model * voxels, stride, i, sums);
    write_gaussians(sums, model * shape.gaussians + begin, count, out);
  }
}

}  // namespace CRYOSPLAT_ISA
}  // namespace cryosplat
