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
  Matrix3<V> r;

  Oriented(const Scalar* quaternions, const Scalar* scales_of, std::int64_t count) {
    V q[4], s[3];
    gather(quaternions, count, q);
    gather(scales_of, count, s);
    inverse_norm = Scalar(1) / square_root(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
    unit = {q[0] * inverse_norm, q[1] * inverse_norm, q[2] * inverse_norm, q[3] * inverse_norm};
    scales = {s[0], s[1], s[2]};
    r = rotation(unit);
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
    const Symmetric3<Vector<Scalar>> s = covariance<Vector<Scalar>>(
        {scaled(o.r.x, o.scales), scaled(o.r.y, o.scales), scaled(o.r.z, o.scales)});
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
    const Symmetric3<V> own = in_own_axes({h[0], h[1], h[2], h[3], h[4], h[5]}, o.r);
    scatter({own.xx * o.scales.x, own.yy * o.scales.y, own.zz * o.scales.z}, left, grad_scales + 3 * i);
    // At right angles to q, so dividing by |q| is all that the normalisation adds.
    const Quaternion<V> g = torque_to_quaternion(o.unit, torque(own, o.scales));
    scatter({g.w * o.inverse_norm, g.x * o.inverse_norm, g.y * o.inverse_norm, g.z * o.inverse_norm}, left,
            grad_quaternions + 4 * i);
  });
}

}  // namespace CRYOSPLAT_ISA
}  // namespace cryosplat
