// The contract of the compiled core. Every backend implements exactly this;
// one could write another from this file alone.
//
// Symbols      M mixtures (models), G Gaussians in each, V views, D box in pixels.
// Memory       raw pointers to contiguous arrays, last axis fastest; the caller
//              has checked shapes, types and devices and has allocated outputs.
//              Outputs are overwritten entirely; nothing needs zeroing first.
// Units        pixels of the output grid, for means, covariances and shifts.
// Centre       voxel D/2 (integer division) on every axis; means are relative to it.
// Axes         vectors are (x, y, z); images are [y, x], volumes [z, y, x].
//
// A mixture is rho(r) = sum_g A_g N3(r; mu_g, S_g), S_g symmetric positive
// definite, stored as its six entries in the order xx, xy, xz, yy, yz, zz.
// Amplitudes may have either sign. N2, N3 are normalised densities.
//
// splat: orthographic projection of mixture model[v] under view v,
//   image[v, y, x] = sum_g A_g N2( (x, y); m, C ) over the pixels with
//                    |x - m_x| <= cutoff sqrt(C_xx)  and  |y - m_y| <= cutoff sqrt(C_yy)
//   m = (R_v mu_g)_xy + D/2 - t_v                  t_v = shifts[v], in pixels
//   C = upper left 2x2 of R_v S_g R_v^T
// so sum over pixels = sum of A_g for broad Gaussians well inside the image.
//
// voxelise: mixture m on the voxel grid, plane by plane,
//   volume[m, z, y, x] = sum_g A_g N3( (x, y, z); mu_g + D/2, S_g ) over the voxels with
//                    |z - mu_z - D/2| <= cutoff sqrt(S_zz) and, in that plane, the splat rule above
//                    applied to the conditional Gaussian of (x, y) given z:
//   m = mu_xy + D/2 + S_xy,z dz / S_zz,  dz = z - mu_z - D/2;  C = S_xy,xy - S_xy,z S_z,xy / S_zz
//
// covariances: of Gaussians given by a quaternion and three standard deviations each,
//   S = R(q / |q|) diag(s^2) R(q / |q|)^T,   q = (w, x, y, z), R as of a unit quaternion
//
// Backward functions take the gradient of a scalar loss with respect to the
// output and return it with respect to the inputs. The cut-off's edge is not
// differentiated. Gradients of covariances are with respect to the six stored
// numbers (an off-diagonal entry stands for both of its places in the matrix).
// Gradients of rotations are with respect to the nine entries taken as free;
// the third row receives zero, since the projection does not see it.
//
// Results do not depend on the number of threads, bit for bit.
//
// Degenerate Gaussians (C not positive definite to rounding, or a non-finite
// number anywhere in it) yield NaN in every pixel of their view (splat) or
// mixture (voxelise), and NaN gradients: nothing is skipped in silence.
#pragma once

#include <cstdint>

#include "stream.h"

namespace cryosplat {

struct SplatShape {
  std::int64_t models;     // M
  std::int64_t gaussians;  // G
  std::int64_t views;      // V
  std::int64_t box;        // D
};

// Scalar is float or double. `cutoff` in standard deviations, > 0.
template <class Scalar>
struct SplatInputs {
  const Scalar* means;        // (M, G, 3)  px
  const Scalar* covariances;  // (M, G, 6)  px^2
  const Scalar* amplitudes;   // (M, G)     image units x px^2
  const Scalar* rotations;    // (V, 3, 3)
  const Scalar* shifts;       // (V, 2)     px
  const std::int64_t* model;  // (V,)       which mixture each view shows, 0 <= model < M
};

template <class Scalar>
struct SplatGradients {
  Scalar* means;        // (M, G, 3)
  Scalar* covariances;  // (M, G, 6)
  Scalar* amplitudes;   // (M, G)
  Scalar* rotations;    // (V, 3, 3), or null together with shifts: poses are fixed
  Scalar* shifts;       // (V, 2)
};

namespace cpu {

// images: (V, D, D), written.
template <class Scalar>
void splat_forward(const SplatShape&, const SplatInputs<Scalar>&, double cutoff, Scalar* images, int threads);

// grad_images: (V, D, D), read.
template <class Scalar>
void splat_backward(const SplatShape&, const SplatInputs<Scalar>&, double cutoff, const Scalar* grad_images,
                    const SplatGradients<Scalar>&, int threads);

// volumes: (M, D, D, D), written. Views, rotations, shifts and model are not used.
template <class Scalar>
void voxelise_forward(const SplatShape&, const SplatInputs<Scalar>&, double cutoff, Scalar* volumes, int threads);

// grad_volumes: (M, D, D, D), read. Writes means, covariances and amplitudes.
template <class Scalar>
void voxelise_backward(const SplatShape&, const SplatInputs<Scalar>&, double cutoff, const Scalar* grad_volumes,
                       const SplatGradients<Scalar>&, int threads);

// quaternions: (N, 4), need not be normalised but not be zero; scales: (N, 3); covariances: (N, 6), written.
template <class Scalar>
void covariances_forward(std::int64_t count, const Scalar* quaternions, const Scalar* scales, Scalar* covariances,
                         int threads);

// grad_covariances: (N, 6), read. Writes grad_quaternions (N, 4) and grad_scales (N, 3).
template <class Scalar>
void covariances_backward(std::int64_t count, const Scalar* quaternions, const Scalar* scales,
                          const Scalar* grad_covariances, Scalar* grad_quaternions, Scalar* grad_scales, int threads);

// The instruction set in use: "avx512", "avx2" or "baseline". CRYOSPLAT_ISA in
// the environment lowers it (never raises it above what the processor has).
const char* instruction_set();

}  // namespace cpu

namespace cuda {

// The same on a GPU, without waiting and without memory of their own: `workspace` has as many bytes as the function of
// that name with `_bytes` says, at an address divisible by 256, and nothing in it outlasts the call. They return null,
// or what the CUDA runtime has against a launch. Sums run in an order that depends on shapes alone: the same bits on
// every run. D is at most 4096. A view of a model that does not exist is NaN.

template <class Scalar>
std::int64_t splat_forward_bytes(const SplatShape&);

template <class Scalar>
const char* splat_forward(const SplatShape&, const SplatInputs<Scalar>&, double cutoff, Scalar* images, void* workspace,
                          const Stream&);

template <class Scalar>
std::int64_t splat_backward_bytes(const SplatShape&, bool poses);

template <class Scalar>
const char* splat_backward(const SplatShape&, const SplatInputs<Scalar>&, double cutoff, const Scalar* grad_images,
                           const SplatGradients<Scalar>&, void* workspace, const Stream&);

template <class Scalar>
std::int64_t voxelise_forward_bytes(const SplatShape&);

template <class Scalar>
const char* voxelise_forward(const SplatShape&, const SplatInputs<Scalar>&, double cutoff, Scalar* volumes,
                             void* workspace, const Stream&);

template <class Scalar>
std::int64_t voxelise_backward_bytes(const SplatShape&);

template <class Scalar>
const char* voxelise_backward(const SplatShape&, const SplatInputs<Scalar>&, double cutoff, const Scalar* grad_volumes,
                              const SplatGradients<Scalar>&, void* workspace, const Stream&);

template <class Scalar>
const char* covariances_forward(std::int64_t count, const Scalar* quaternions, const Scalar* scales,
                                Scalar* covariances, const Stream&);

template <class Scalar>
const char* covariances_backward(std::int64_t count, const Scalar* quaternions, const Scalar* scales,
                                 const Scalar* grad_covariances, Scalar* grad_quaternions, Scalar* grad_scales,
                                 const Stream&);

}  // namespace cuda
}  // namespace cryosplat
