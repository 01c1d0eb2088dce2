// The formulas of the mixture, for one Gaussian, shared by every backend.
//
// Everything is templated on T: a scalar on a GPU, a vector of several
// Gaussians on a CPU. Derivations stand beside the formulas; the contract
// (splat.h) says what the symbols mean.
#pragma once

#if defined(__CUDACC__)
#define CRYOSPLAT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CRYOSPLAT_HOST_DEVICE inline __attribute__((always_inline))
#endif

// Each CPU instruction set compiles its own copy of these templates. Without a
// namespace of its own, the linker would keep one copy for all, and an old
// processor could be handed AVX-512 code.
#ifndef CRYOSPLAT_ISA
#define CRYOSPLAT_ISA device
#endif

namespace cryosplat {
namespace CRYOSPLAT_ISA {

constexpr double two_pi = 6.283185307179586476925286766559;

template <class T>
struct Vector2 {
  T x, y;
};

template <class T>
struct Vector3 {
  T x, y, z;
};

template <class T>
struct Symmetric2 {
  T xx, xy, yy;
};

template <class T>
struct Symmetric3 {
  T xx, xy, xz, yy, yz, zz;
};

template <class T>
CRYOSPLAT_HOST_DEVICE T dot(const Vector3<T>& a, const Vector3<T>& b) {
  return a.x * b.x + a.y * b.y + a.z * b.z;
}

template <class T>
struct Matrix3 {
  Vector3<T> x, y, z;  // rows
};

// Quaternion w, x, y, z.
template <class T>
struct Quaternion {
  T w, x, y, z;
};

template <class T>
CRYOSPLAT_HOST_DEVICE Matrix3<T> rotation(const Quaternion<T>& q) {
  return {{1.0f - 2.0f * (q.y * q.y + q.z * q.z), 2.0f * (q.x * q.y - q.w * q.z), 2.0f * (q.x * q.z + q.w * q.y)},
          {2.0f * (q.x * q.y + q.w * q.z), 1.0f - 2.0f * (q.x * q.x + q.z * q.z), 2.0f * (q.y * q.z - q.w * q.x)},
          {2.0f * (q.x * q.z - q.w * q.y), 2.0f * (q.y * q.z + q.w * q.x), 1.0f - 2.0f * (q.x * q.x + q.y * q.y)}};
}

template <class T>
CRYOSPLAT_HOST_DEVICE Vector3<T> scaled(const Vector3<T>& row, const Vector3<T>& by) {
  return {row.x * by.x, row.y * by.y, row.z * by.z};
}

// S = F F^T with F = R diag(s).
template <class T>
CRYOSPLAT_HOST_DEVICE Symmetric3<T> covariance(const Matrix3<T>& f) {
  return {dot(f.x, f.x), dot(f.x, f.y), dot(f.x, f.z), dot(f.y, f.y), dot(f.y, f.z), dot(f.z, f.z)};
}

// 2 R^T G R, where g holds the derivatives of the six stored numbers: off the diagonal G is half of them.
template <class T>
CRYOSPLAT_HOST_DEVICE Symmetric3<T> in_own_axes(const Symmetric3<T>& g, const Matrix3<T>& r) {
  const auto row = [&](T a, T b, T c) -> Vector3<T> {
    return {a * r.x.x + b * r.y.x + c * r.z.x, a * r.x.y + b * r.y.y + c * r.z.y, a * r.x.z + b * r.y.z + c * r.z.z};
  };
  const Vector3<T> x = row(2.0f * g.xx, g.xy, g.xz), y = row(g.xy, 2.0f * g.yy, g.yz), z = row(g.xz, g.yz, 2.0f * g.zz);
  return {r.x.x * x.x + r.y.x * y.x + r.z.x * z.x, r.x.x * x.y + r.y.x * y.y + r.z.x * z.y,
          r.x.x * x.z + r.y.x * y.z + r.z.x * z.z, r.x.y * x.y + r.y.y * y.y + r.z.y * z.y,
          r.x.y * x.z + r.y.y * y.z + r.z.y * z.z, r.x.z * x.z + r.y.z * y.z + r.z.z * z.z};
}

// Derivative with respect to a turn about the Gaussian's own axes, given h = in_own_axes(g, r). With the differences of
// squares it is exactly zero where two scales are equal; rounding noise there would be a full step to Adam.
template <class T>
CRYOSPLAT_HOST_DEVICE Vector3<T> torque(const Symmetric3<T>& h, const Vector3<T>& s) {
  return {h.yz * ((s.y - s.z) * (s.y + s.z)), h.xz * ((s.z - s.x) * (s.z + s.x)), h.xy * ((s.x - s.y) * (s.x + s.y))};
}

// 2 q (0, t): the derivative with respect to the unit quaternion of R(q), given that to a turn t about R's own axes.
template <class T>
CRYOSPLAT_HOST_DEVICE Quaternion<T> torque_to_quaternion(const Quaternion<T>& q, const Vector3<T>& t) {
  return {-2.0f * (q.x * t.x + q.y * t.y + q.z * t.z), 2.0f * (q.w * t.x + q.y * t.z - q.z * t.y),
          2.0f * (q.w * t.y + q.z * t.x - q.x * t.z), 2.0f * (q.w * t.z + q.x * t.y - q.y * t.x)};
}

// The first two rows of a rotation: all that an orthographic projection sees.
template <class T>
struct ViewRows {
  Vector3<T> x, y;
};

template <class T>
CRYOSPLAT_HOST_DEVICE Vector3<T> times(const Symmetric3<T>& s, const Vector3<T>& v) {
  return {s.xx * v.x + s.xy * v.y + s.xz * v.z,  //
          s.xy * v.x + s.yy * v.y + s.yz * v.z,  //
          s.xz * v.x + s.yz * v.y + s.zz * v.z};
}

template <class T>
CRYOSPLAT_HOST_DEVICE T determinant(const Symmetric2<T>& c) {
  return c.xx * c.yy - c.xy * c.xy;
}

template <class T>
CRYOSPLAT_HOST_DEVICE Symmetric2<T> inverse(const Symmetric2<T>& c, T det) {
  const T s = T{} + 1.0f / det;
  return {c.yy * s, -c.xy * s, c.xx * s};
}

// C = upper left 2x2 of R S R^T; the products S r_x, S r_y are kept for the way back.
template <class T>
struct ProjectedCovariance {
  Symmetric2<T> c;
  Vector3<T> s_rx, s_ry;
};

template <class T>
CRYOSPLAT_HOST_DEVICE ProjectedCovariance<T> project(const Symmetric3<T>& s, const ViewRows<T>& r) {
  const Vector3<T> s_rx = times(s, r.x), s_ry = times(s, r.y);
  return {{dot(r.x, s_rx), dot(r.y, s_rx), dot(r.y, s_ry)}, s_rx, s_ry};
}

// Moments over pixels of w = residual * N2(d; C), d the offset from the mean.
template <class T>
struct Moments2 {
  T one, x, y, xx, xy, yy;
};

// With f = A N2(d; C), P = C^-1 and L the loss:
//   dL/dA = <1>,  dL/dm = A P <d>,  dL/dC = A/2 (P <d d^T> P - <1> P)
template <class T>
struct PlanarGradient {
  T amplitude;
  Vector2<T> mean;
  Symmetric2<T> covariance;  // as a symmetric matrix: entry xy stands for one place
};

template <class T>
CRYOSPLAT_HOST_DEVICE PlanarGradient<T> planar_gradient(const Moments2<T>& m, const Symmetric2<T>& p, T amplitude) {
  // Q = P <d d^T>, row by row; then dL/dC = A/2 (Q P - <1> P).
  const T q_xx = p.xx * m.xx + p.xy * m.xy, q_xy = p.xx * m.xy + p.xy * m.yy;
  const T q_yx = p.xy * m.xx + p.yy * m.xy, q_yy = p.xy * m.xy + p.yy * m.yy;
  const T half = amplitude * 0.5f;
  return {m.one,
          {amplitude * (p.xx * m.x + p.xy * m.y), amplitude * (p.xy * m.x + p.yy * m.y)},
          {half * (q_xx * p.xx + q_xy * p.xy - m.one * p.xx),  //
           half * (q_xx * p.xy + q_xy * p.yy - m.one * p.xy),  //
           half * (q_yx * p.xy + q_yy * p.yy - m.one * p.yy)}};
}

// Through the projection: m = P mu, C = P S P^T with P the two view rows.
//   dL/dmu = P^T g,  dL/dS = P^T H P,  dL/dP = 2 H P S + g mu^T
template <class T>
CRYOSPLAT_HOST_DEVICE Vector3<T> mean_gradient(const PlanarGradient<T>& g, const ViewRows<T>& r) {
  return {g.mean.x * r.x.x + g.mean.y * r.y.x,  //
          g.mean.x * r.x.y + g.mean.y * r.y.y,  //
          g.mean.x * r.x.z + g.mean.y * r.y.z};
}

// With respect to the six stored numbers: an off-diagonal one counts twice.
template <class T>
CRYOSPLAT_HOST_DEVICE Symmetric3<T> covariance_gradient(const PlanarGradient<T>& g, const ViewRows<T>& r) {
  const auto& h = g.covariance;
  const Vector3<T> h_x{h.xx * r.x.x + h.xy * r.y.x, h.xx * r.x.y + h.xy * r.y.y, h.xx * r.x.z + h.xy * r.y.z};
  const Vector3<T> h_y{h.xy * r.x.x + h.yy * r.y.x, h.xy * r.x.y + h.yy * r.y.y, h.xy * r.x.z + h.yy * r.y.z};
  return {r.x.x * h_x.x + r.y.x * h_y.x,          //
          (r.x.x * h_x.y + r.y.x * h_y.y) * 2.0f,  //
          (r.x.x * h_x.z + r.y.x * h_y.z) * 2.0f,  //
          r.x.y * h_x.y + r.y.y * h_y.y,          //
          (r.x.y * h_x.z + r.y.y * h_y.z) * 2.0f,  //
          r.x.z * h_x.z + r.y.z * h_y.z};
}

template <class T>
CRYOSPLAT_HOST_DEVICE ViewRows<T> rotation_gradient(const PlanarGradient<T>& g, const ProjectedCovariance<T>& p,
                                                    const Vector3<T>& mu) {
  const T xx = g.covariance.xx * 2.0f, xy = g.covariance.xy * 2.0f, yy = g.covariance.yy * 2.0f;
  return {{xx * p.s_rx.x + xy * p.s_ry.x + g.mean.x * mu.x,  //
           xx * p.s_rx.y + xy * p.s_ry.y + g.mean.x * mu.y,  //
           xx * p.s_rx.z + xy * p.s_ry.z + g.mean.x * mu.z},
          {xy * p.s_rx.x + yy * p.s_ry.x + g.mean.y * mu.x,  //
           xy * p.s_rx.y + yy * p.s_ry.y + g.mean.y * mu.y,  //
           xy * p.s_rx.z + yy * p.s_ry.z + g.mean.y * mu.z}};
}

// A 3D Gaussian cut by planes of constant z: N3 = N1(dz; S_zz) N2(d - slope dz; C).
template <class T>
struct Conditional {
  Vector2<T> slope;    // S_xy,z / S_zz
  Symmetric2<T> c;     // S_xy,xy - S_xy,z S_z,xy / S_zz
  Symmetric2<T> p;     // its inverse
  T inverse_variance;  // 1 / S_zz
  T norm;              // 1 / ((2 pi)^(3/2) sqrt(S_zz det C))
};

// Sums over the planes of Moments2 weighted with N1(dz), and with dz, dz^2.
template <class T>
struct Moments3 {
  Moments2<T> planar;
  T z, zz;  // <dz>, <dz^2>
  Vector2<T> planar_z;  // <d dz>
};

template <class T>
struct SolidGradient {
  T amplitude;
  Vector3<T> mean;
  Symmetric3<T> covariance;  // of the six stored numbers
};

// The planar gradient, then through slope and C, which both depend on S:
//   dL/dmu_z = A <dz> / S_zz - slope . dL/dm
//   dL/dS_zz gets A/2 (<dz^2>/S_zz^2 - <1>/S_zz) - slope . dslope / S_zz + slope^T H slope
//   dL/dS_xy,z gets dslope / S_zz - 2 H slope,   dslope = A P <d dz>
template <class T>
CRYOSPLAT_HOST_DEVICE SolidGradient<T> solid_gradient(const PlanarGradient<T>& g, const Vector2<T>& dslope,
                                                      const Moments3<T>& m, const Conditional<T>& k, T amplitude) {
  const auto& h = g.covariance;
  const T iv = k.inverse_variance;
  const Vector2<T> h_slope{h.xx * k.slope.x + h.xy * k.slope.y, h.xy * k.slope.x + h.yy * k.slope.y};
  const T zz = amplitude * 0.5f * iv * (m.zz * iv - m.planar.one) -
               (k.slope.x * dslope.x + k.slope.y * dslope.y) * iv + k.slope.x * h_slope.x + k.slope.y * h_slope.y;
  return {g.amplitude,
          {g.mean.x, g.mean.y, amplitude * m.z * iv - k.slope.x * g.mean.x - k.slope.y * g.mean.y},
          {h.xx, h.xy * 2.0f, dslope.x * iv - h_slope.x * 2.0f, h.yy, dslope.y * iv - h_slope.y * 2.0f, zz}};
}

template <class T>
CRYOSPLAT_HOST_DEVICE SolidGradient<T> solid_gradient(const Moments3<T>& m, const Conditional<T>& k, T amplitude) {
  const Vector2<T> dslope{amplitude * (k.p.xx * m.planar_z.x + k.p.xy * m.planar_z.y),
                          amplitude * (k.p.xy * m.planar_z.x + k.p.yy * m.planar_z.y)};
  return solid_gradient(planar_gradient(m.planar, k.p, amplitude), dslope, m, k, amplitude);
}

}  // namespace CRYOSPLAT_ISA
}  // namespace cryosplat
