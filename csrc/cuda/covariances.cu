// covariances on GPUs: a thread a Gaussian.
#include "../splat.h"

#include "../math.h"
#include "launch.h"
#include "warp.h"

namespace cryosplat {
namespace cuda {

namespace {

using device::Matrix3;
using device::Quaternion;
using device::Symmetric3;
using device::Vector3;

constexpr int threads_in_block = 256;

// What forward and backward both begin with.
template <class T>
struct Oriented {
  T inverse_norm;
  Quaternion<T> unit;
  Vector3<T> scales;
  Matrix3<T> r;

  __device__ Oriented(const T* q, const T* s) : scales{s[0], s[1], s[2]} {
    inverse_norm = 1 / sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
    unit = {q[0] * inverse_norm, q[1] * inverse_norm, q[2] * inverse_norm, q[3] * inverse_norm};
    r = rotation(unit);
  }
};

template <class T>
__global__ void __launch_bounds__(threads_in_block)
    covariances_compose(Index count, const T* __restrict__ quaternions, const T* __restrict__ scales,
                        T* __restrict__ covariances) {
  const Index i = Index(blockIdx.x) * threads_in_block + threadIdx.x;
  if (i >= count) return;
  const Oriented<T> o(quaternions + 4 * i, scales + 3 * i);
  const Symmetric3<T> s =
      covariance(Matrix3<T>{scaled(o.r.x, o.scales), scaled(o.r.y, o.scales), scaled(o.r.z, o.scales)});
  T* to = covariances + 6 * i;
  to[0] = s.xx, to[1] = s.xy, to[2] = s.xz, to[3] = s.yy, to[4] = s.yz, to[5] = s.zz;
}

template <class T>
__global__ void __launch_bounds__(threads_in_block)
    covariances_differentiate(Index count, const T* __restrict__ quaternions, const T* __restrict__ scales,
                              const T* __restrict__ grad_covariances, T* __restrict__ grad_quaternions,
                              T* __restrict__ grad_scales) {
  const Index i = Index(blockIdx.x) * threads_in_block + threadIdx.x;
  if (i >= count) return;
  const Oriented<T> o(quaternions + 4 * i, scales + 3 * i);
  const T* h = grad_covariances + 6 * i;
  const Symmetric3<T> own = in_own_axes(Symmetric3<T>{h[0], h[1], h[2], h[3], h[4], h[5]}, o.r);
  T* to_scales = grad_scales + 3 * i;
  to_scales[0] = own.xx * o.scales.x, to_scales[1] = own.yy * o.scales.y, to_scales[2] = own.zz * o.scales.z;
  // At right angles to q, so dividing by |q| is all that the normalisation adds.
  const Quaternion<T> g = torque_to_quaternion(o.unit, torque(own, o.scales));
  T* to = grad_quaternions + 4 * i;
  to[0] = g.w * o.inverse_norm, to[1] = g.x * o.inverse_norm;
  to[2] = g.y * o.inverse_norm, to[3] = g.z * o.inverse_norm;
}

inline dim3 blocks_for(Index count) { return dim3(unsigned(pieces(count, threads_in_block))); }

}  // namespace

template <class Scalar>
const char* covariances_forward(std::int64_t count, const Scalar* quaternions, const Scalar* scales,
                                Scalar* covariances, const Stream& stream) {
  if (count == 0) return nullptr;
  return launch(covariances_compose<Scalar>, blocks_for(count), dim3(threads_in_block), stream, count, quaternions,
                scales, covariances);
}

template <class Scalar>
const char* covariances_backward(std::int64_t count, const Scalar* quaternions, const Scalar* scales,
                                 const Scalar* grad_covariances, Scalar* grad_quaternions, Scalar* grad_scales,
                                 const Stream& stream) {
  if (count == 0) return nullptr;
  return launch(covariances_differentiate<Scalar>, blocks_for(count), dim3(threads_in_block), stream, count,
                quaternions, scales, grad_covariances, grad_quaternions, grad_scales);
}

#define CRYOSPLAT_INSTANTIATE(Scalar)                                                                              \
  template const char* covariances_forward(std::int64_t, const Scalar*, const Scalar*, Scalar*, const Stream&);    \
  template const char* covariances_backward(std::int64_t, const Scalar*, const Scalar*, const Scalar*, Scalar*,    \
                                            Scalar*, const Stream&)
CRYOSPLAT_INSTANTIATE(float);
CRYOSPLAT_INSTANTIATE(double);
#undef CRYOSPLAT_INSTANTIATE

}  // namespace cuda
}  // namespace cryosplat
