// covariances on CPUs: a vector of Gaussians at a time.
#pragma once

#include "mixture.h"

namespace cryosplat {
namespace CRYOSPLAT_ISA {

// Gaussians of a task: enough to be worth a thread.
constexpr std::int64_t gaussians_a_task = 2048;

// `columns` numbers each of up to a vector of Gaussians, from rows to vectors; lanes without a Gaussian are 1.
template <class Scalar, int columns>
inline void gather(const Scalar* from, std::int64_t count, Vector<Scalar> (&to)[columns]) {
  Scalar lane[columns][lanes<Scalar>];
  for (int k = 0; k < lanes<Scalar>; ++k)
    for (int i = 0; i < columns; ++i) lane[i][k] = k < count ? from[columns * k + i] : Scalar(1);
  for (int i = 0; i < columns; ++i) to[i] = load<Vector<Scalar>>(lane[i]);
}

template <class Scalar, int columns>
inline void scatter(const Vector<Scalar> (&from)[columns], std::int64_t count, Scalar* to) {
  Scalar lane[columns][lanes<Scalar>];
  for (int i = 0; i < columns; ++i) store(lane[i], from[i]);
  for (int k = 0; k < lanes<Scalar> && k < count; ++k)
    for (int i = 0; i < columns; ++i) to[columns * k + i] = lane[i][k];
}

// What forward and backward both begin with.
template <class Scalar>
struct Oriented {
  typedef Vector<Scalar> V;
  Quaternion<V> unit;
  V inverse_norm;
  Vector3<V> scales;
  Matrix3<V> r, f;

  Oriented(const Scalar* quaternions, const Scalar* scales_of, std::int64_t count) {
    V q[4], s[3];
    gather(quaternions, count, q);
    gather(scales_of, count, s);
    inverse_norm = Scalar(1) / square_root(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
    unit = {q[0] * inverse_norm, q[1] * inverse_norm, q[2] * inverse_norm, q[3] * inverse_norm};
    scales = {s[0], s[1], s[2]};
    r = rotation(unit);
    f = {scaled(r.x, scales), scaled(r.y, scales), scaled(r.z, scales)};
  }
};

template <class Work>
void by_tasks(std::int64_t count, int step, int threads, Work work) {
  const std::int64_t tasks = (count + gaussians_a_task - 1) / gaussians_a_task;
#pragma omp parallel for schedule(static) num_threads(threads) if (tasks > 1)
  for (std::int64_t task = 0; task < tasks; ++task) {
    const std::int64_t end = (task + 1) * gaussians_a_task < count ? (task + 1) * gaussians_a_task : count;
    for (std::int64_t i = task * gaussians_a_task; i < end; i += step) work(i, end - i);
  }
}

template <class Scalar>
void covariances_forward(std::int64_t count, const Scalar* quaternions, const Scalar* scales, Scalar* covariances,
                         int threads) {
  by_tasks(count, lanes<Scalar>, threads, [=](std::int64_t i, std::int64_t left) {
    const Oriented<Scalar> o(quaternions + 4 * i, scales + 3 * i, left);
    const Symmetric3<Vector<Scalar>> s = covariance(o.f);
    scatter({s.xx, s.xy, s.xz, s.yy, s.yz, s.zz}, left, covariances + 6 * i);
  });
}

template <class Scalar>
void covariances_backward(std::int64_t count, const Scalar* quaternions, const Scalar* scales,
                          const Scalar* grad_covariances, Scalar* grad_quaternions, Scalar* grad_scales, int threads) {
  typedef Vector<Scalar> V;
  by_tasks(count, lanes<Scalar>, threads, [=](std::int64_t i, std::int64_t left) {
    const Oriented<Scalar> o(quaternions + 4 * i, scales + 3 * i, left);
    V h[6];
    gather(grad_covariances + 6 * i, left, h);
    const Matrix3<V> d = factor_gradient({h[0], h[1], h[2], h[3], h[4], h[5]}, o.f);
    const V s_x = d.x.x * o.r.x.x + d.y.x * o.r.y.x + d.z.x * o.r.z.x;
    const V s_y = d.x.y * o.r.x.y + d.y.y * o.r.y.y + d.z.y * o.r.z.y;
    const V s_z = d.x.z * o.r.x.z + d.y.z * o.r.y.z + d.z.z * o.r.z.z;
    scatter({s_x, s_y, s_z}, left, grad_scales + 3 * i);
    const Matrix3<V> d_r{scaled(d.x, o.scales), scaled(d.y, o.scales), scaled(d.z, o.scales)};
    const Quaternion<V> g = rotation_to_quaternion_gradient(d_r, o.unit);
    // Through q / |q|: the part along q has no effect.
    const V along = g.w * o.unit.w + g.x * o.unit.x + g.y * o.unit.y + g.z * o.unit.z;
    scatter({(g.w - along * o.unit.w) * o.inverse_norm, (g.x - along * o.unit.x) * o.inverse_norm,
             (g.y - along * o.unit.y) * o.inverse_norm, (g.z - along * o.unit.z) * o.inverse_norm},
            left, grad_quaternions + 4 * i);
  });
}

}  // namespace CRYOSPLAT_ISA
}  // namespace cryosplat
