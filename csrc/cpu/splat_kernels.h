// splat on CPUs: forward by bands of rows, backward by blocks of Gaussians.
#pragma once

#include "mixture.h"

namespace cryosplat {
namespace CRYOSPLAT_ISA {

// Gaussians of a backward task: their sums stay in the first-level cache while
// the views pass by. Pose gradients are summed per block, in a fixed order.
constexpr std::int64_t block_gaussians = 128;

template <class Scalar>
struct View {
  ViewRows<Packet> rows;
  Packet origin_x, origin_y;  // where the volume's origin is seen, pixels

  View(const SplatShape& shape, const SplatInputs<Scalar>& in, std::int64_t v) {
    const Scalar* r = in.rotations + 9 * v;
    const Packet zero{};
    const double centre = static_cast<double>(shape.box / 2);
    rows = {{zero + r[0], zero + r[1], zero + r[2]}, {zero + r[3], zero + r[4], zero + r[5]}};
    origin_x = zero + (centre - in.shifts[2 * v]);
    origin_y = zero + (centre - in.shifts[2 * v + 1]);
  }
};

// A packet of Gaussians projected to a view: formulas kept for the way back, and
// what the footprints are made of, a number a lane.
template <class Scalar>
struct ProjectedPacket {
  ProjectedCovariance<Packet> projected;
  Symmetric2<Packet> inverse_c;
  Packet peak;         // of unit amplitude
  Packet poison{};     // NaN in lanes of degenerate Gaussians, else 0
  bool proper = true;  // no lane is poisoned

  ProjectedPacket(const Mixtures& mixtures, std::int64_t model, std::int64_t first, const View<Scalar>& view,
                  std::int64_t box, double cutoff) {
    const Vector3<Packet> mu = mixtures.mean(model, first);
    projected = project(mixtures.covariance(model, first), view.rows);
    const Symmetric2<Packet>& c = projected.c;
    const Packet det = determinant(c), inverse_det = 1.0 / det, inverse_xx = 1.0 / c.xx;
    inverse_c = {c.yy * inverse_det, -c.xy * inverse_det, c.xx * inverse_det};
    peak = square_root(inverse_det) * (1.0 / two_pi);
    const Packet mean_x = dot(view.rows.x, mu) + view.origin_x, mean_y = dot(view.rows.y, mu) + view.origin_y;
    const PixelRange xs = pixel_range(mean_x, square_root(c.xx) * cutoff, box);
    const PixelRange ys = pixel_range(mean_y, square_root(c.yy) * cutoff, box);
    store(x0_, xs.first), store(x1_, xs.last), store(y0_, ys.first), store(y1_, ys.last);
    store_narrow(mean_x_, mean_x - __builtin_convertvector(xs.first, Packet));
    store_narrow(mean_y_, mean_y - __builtin_convertvector(ys.first, Packet));
    store_narrow(inverse_xx_, inverse_xx);
    store_narrow(slope_, -c.xy * inverse_xx);
    store_narrow(p_yy_, inverse_c.yy);
    store_narrow(decay_, exponential<double>(-inverse_c.yy));
    store(steep_, is_steep(c.xx, c.xy, c.yy, cutoff));
    const auto usable = is_proper(c, det, mean_x, mean_y, mixtures.amplitude(model, first));
    for (int k = 0; k < packet; ++k) {
      if (usable[k]) continue;
      x1_[k] = -1;
      if (first + k < mixtures.gaussians()) {
        poison[k] = NAN;
        proper = false;
      }
    }
    for (std::int64_t k = mixtures.gaussians() - first; k < packet; ++k) x1_[k] = -1;
  }

  // Whether lane k has pixels in rows begin..end-1.
  bool touches(int k, int begin, int end) const { return x0_[k] <= x1_[k] && y0_[k] < end && y1_[k] >= begin; }

  int x0(int k) const { return x0_[k]; }

  Footprint<Scalar> footprint(int k) const {
    return {x0_[k], x1_[k],         y0_[k],    y1_[k],   mean_x_[k], mean_y_[k],
            inverse_xx_[k], slope_[k], p_yy_[k], decay_[k],  steep_[k] != 0};
  }

 private:
  static void store_narrow(Scalar* to, Packet from) {
    store(to, __builtin_convertvector(from, typename VectorOf<Scalar, packet>::type));
  }

  int x0_[packet], x1_[packet], y0_[packet], y1_[packet];
  Scalar mean_x_[packet], mean_y_[packet], inverse_xx_[packet], slope_[packet], p_yy_[packet], decay_[packet];
  std::int64_t steep_[packet];
};

// Rows shorter than a vector are widened, so that the inner loop needs no other case.
template <class Scalar>
std::int64_t row_stride(std::int64_t box) {
  return box < lanes<Scalar> ? lanes<Scalar> : box;
}

template <class Scalar>
void copy_rows(const Scalar* from, std::int64_t from_stride, Scalar* to, std::int64_t to_stride, std::int64_t rows,
               std::int64_t columns) {
  for (std::int64_t y = 0; y < rows; ++y)
    std::memcpy(to + y * to_stride, from + y * from_stride, columns * sizeof(Scalar));
}

template <class Scalar>
void draw_band(const Mixtures& mixtures, const SplatShape& shape, const SplatInputs<Scalar>& in, double cutoff,
               std::int64_t v, int row_begin, int row_end, Scalar* image, std::int64_t stride) {
  const View<Scalar> view(shape, in, v);
  const std::int64_t model = in.model[v];
  std::memset(image + row_begin * stride, 0, (row_end - row_begin) * stride * sizeof(Scalar));
  bool proper = true;
  for (std::int64_t first = 0; first < mixtures.gaussians(); first += packet) {
    const ProjectedPacket<Scalar> p(mixtures, model, first, view, shape.box, cutoff);
    proper &= p.proper;
    double height[packet];
    store(height, mixtures.amplitude(model, first) * p.peak);
    for (int k = 0; k < packet; ++k) {
      if (!p.touches(k, row_begin, row_end)) continue;
      Adder<Scalar> adder{image, stride, static_cast<Scalar>(height[k])};
      const Footprint<Scalar> f = p.footprint(k);
      walk(f, columns_from(f, f.x0, static_cast<int>(stride)), static_cast<int>(stride), row_begin, row_end, adder);
    }
  }
  if (!proper)
    for (std::int64_t i = row_begin * stride; i < row_end * stride; ++i) image[i] = static_cast<Scalar>(NAN);
}

template <class Scalar>
void splat_forward(const SplatShape& shape, const SplatInputs<Scalar>& in, double cutoff, Scalar* images, int threads) {
  const Mixtures mixtures(shape, in);
  const std::int64_t box = shape.box, stride = row_stride<Scalar>(box);
  // Whole views are the cheapest tasks (set-up once each); bands fill the threads when views are few.
  const std::int64_t wanted = shape.views > 0 ? (2 * threads + shape.views - 1) / shape.views : 1;
  const std::int64_t bands = shape.views >= 2 * threads || wanted < 1 ? 1 : (wanted < box ? wanted : box);
  const bool widened = stride != box;
  Buffer<Scalar> scratch(widened ? shape.views * box * stride : 0);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t task = 0; task < shape.views * bands; ++task) {
    const std::int64_t v = task / bands, band = task % bands;
    const std::int64_t row_begin = box * band / bands, row_end = box * (band + 1) / bands;
    Scalar* image = widened ? scratch.get() + v * box * stride : images + v * box * box;
    draw_band(mixtures, shape, in, cutoff, v, static_cast<int>(row_begin), static_cast<int>(row_end), image, stride);
    if (widened)
      copy_rows(image + row_begin * stride, stride, images + (v * box + row_begin) * box, box, row_end - row_begin,
                box);
  }
}

// Sums over views for a block of Gaussians, and over the block for each view.
struct BlockSums {
  double gaussian[parameters][block_gaussians];
};

struct PoseSums {
  double rotation[6], shift[2];
};

inline void accumulate(double* to, Packet value) { store(to, load<Packet>(to) + value); }

// One packet's part in a view: moments over its footprints, then the chain rule for all lanes at once.
template <class Scalar>
void gather_packet(const Mixtures& mixtures, std::int64_t model, std::int64_t first, const View<Scalar>& view,
                   std::int64_t box, double cutoff, const Scalar* residual, std::int64_t stride, std::int64_t in_block,
                   BlockSums& sums, PoseSums* pose) {
  const ProjectedPacket<Scalar> p(mixtures, model, first, view, box, cutoff);
  double lane[6][packet];
  Columns<Scalar> columns[packet];
  for (int k = 0; k < packet; ++k) columns[k] = columns_from(p.footprint(k), p.x0(k), static_cast<int>(stride));
  for (int k = 0; k < packet; ++k) {
    MomentSummer<Scalar> summer{residual, stride};
    if (p.touches(k, 0, static_cast<int>(box)))
      walk(p.footprint(k), columns[k], static_cast<int>(stride), 0, static_cast<int>(box), summer);
    const Moments2<Scalar> t = summer.moments();
    lane[0][k] = t.one, lane[1][k] = t.x, lane[2][k] = t.y, lane[3][k] = t.xx, lane[4][k] = t.xy, lane[5][k] = t.yy;
  }
  const auto moment = [&](int i) { return load<Packet>(lane[i]) * p.peak + p.poison; };
  // Padding has finite parameters and no pixels, so its gradients are zero.
  const Moments2<Packet> m{moment(0), moment(1), moment(2), moment(3), moment(4), moment(5)};
  const Packet amplitude = mixtures.amplitude(model, first);
  const PlanarGradient<Packet> g = planar_gradient(m, p.inverse_c, amplitude);
  const Vector3<Packet> d_mean = mean_gradient(g, view.rows);
  const Symmetric3<Packet> d_cov = covariance_gradient(g, view.rows);
  const Packet all[parameters] = {d_mean.x,  d_mean.y,  d_mean.z,  d_cov.xx, d_cov.xy,
                                  d_cov.xz,  d_cov.yy,  d_cov.yz,  d_cov.zz, g.amplitude};
  for (int k = 0; k < parameters; ++k) accumulate(sums.gaussian[k] + in_block, all[k]);
  if (!pose) return;
  const ViewRows<Packet> d_rows = rotation_gradient(g, p.projected, mixtures.mean(model, first));
  const Packet rotation[6] = {d_rows.x.x, d_rows.x.y, d_rows.x.z, d_rows.y.x, d_rows.y.y, d_rows.y.z};
  for (int k = 0; k < 6; ++k) pose->rotation[k] += sum<double>(rotation[k]);
  pose->shift[0] -= sum<double>(g.mean.x);
  pose->shift[1] -= sum<double>(g.mean.y);
}

template <class Scalar>
void write_gaussians(const BlockSums& sums, std::int64_t first, std::int64_t count, const SplatGradients<Scalar>& out) {
  for (std::int64_t g = 0; g < count; ++g) {
    for (int k = 0; k < 3; ++k) out.means[3 * (first + g) + k] = static_cast<Scalar>(sums.gaussian[k][g]);
    for (int k = 0; k < 6; ++k) out.covariances[6 * (first + g) + k] = static_cast<Scalar>(sums.gaussian[3 + k][g]);
    out.amplitudes[first + g] = static_cast<Scalar>(sums.gaussian[9][g]);
  }
}

template <class Scalar>
void write_poses(const Buffer<PoseSums>& partial, const SplatShape& shape, std::int64_t blocks,
                 const SplatGradients<Scalar>& out) {
  for (std::int64_t v = 0; v < shape.views; ++v) {
    PoseSums total{};
    for (std::int64_t b = 0; b < blocks; ++b) {
      const PoseSums& part = partial[b * shape.views + v];
      for (int k = 0; k < 6; ++k) total.rotation[k] += part.rotation[k];
      for (int k = 0; k < 2; ++k) total.shift[k] += part.shift[k];
    }
    for (int k = 0; k < 9; ++k) out.rotations[9 * v + k] = k < 6 ? static_cast<Scalar>(total.rotation[k]) : Scalar(0);
    for (int k = 0; k < 2; ++k) out.shifts[2 * v + k] = static_cast<Scalar>(total.shift[k]);
  }
}

template <class Scalar>
void splat_backward(const SplatShape& shape, const SplatInputs<Scalar>& in, double cutoff, const Scalar* grad_images,
                    const SplatGradients<Scalar>& out, int threads) {
  const Mixtures mixtures(shape, in);
  const std::int64_t box = shape.box, stride = row_stride<Scalar>(box), views = shape.views;
  const bool widened = stride != box;
  Buffer<Scalar> scratch(widened ? views * box * stride : 0);
  if (widened) copy_rows(grad_images, box, scratch.get(), stride, views * box, box);
  const Scalar* residuals = widened ? scratch.get() : grad_images;

  const std::int64_t blocks = (shape.gaussians + block_gaussians - 1) / block_gaussians;
  const bool poses = out.rotations != nullptr;
  Buffer<PoseSums> partial(poses ? blocks * views : 0);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t task = 0; task < shape.models * blocks; ++task) {
    const std::int64_t model = task / blocks, block = task % blocks, begin = block * block_gaussians;
    const std::int64_t left = shape.gaussians - begin, count = left < block_gaussians ? left : block_gaussians;
    BlockSums sums{};
    for (std::int64_t v = 0; v < views; ++v) {
      if (in.model[v] != model) continue;
      const View<Scalar> view(shape, in, v);
      PoseSums* pose = poses ? &partial[block * views + v] : nullptr;
      for (std::int64_t i = 0; i < count; i += packet)
        gather_packet(mixtures, model, begin + i, view, box, cutoff, residuals + v * box * stride, stride, i, sums,
                      pose);
    }
    write_gaussians(sums, model * shape.gaussians + begin, count, out);
  }
  if (poses) write_poses(partial, shape, blocks, out);
}

}  // namespace CRYOSPLAT_ISA
}  // namespace cryosplat
