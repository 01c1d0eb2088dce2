// The contract of Fourier insertion (back-projection). Symbols, memory and axes as in splat.h; besides them
//
//   P   side of the padded Fourier grid in voxels, even, P >= D
//   K   grids (half a, half b)
//
// A view is the transform of an image, a half-spectrum as rfft2 gives it, phases referring to its first pixel. Its
// coefficient (kx, ky), in cycles per box, is that of the volume at the point, in voxels of the padded grid,
//
//   q = P/D R_v^T (kx, ky, 0)
//
// once the image's origin D/2 - t_v has been taken to the first pixel: multiplied by exp(+2 pi i k . (D/2 - t_v) / D),
// D/2 an integer division. This is the adjoint of slicing the padded grid with trilinear interpolation: with
// T(q', q) = prod over the axes of max(0, 1 - |q'_a - q_a|), every grid point q' of grid[v] gets
//
//   n(q') += T(q', q) value[v, k] exp(+2 pi i k . (D/2 - t_v) / D)
//   d(q') += T(q', q) weight[v, k]
//   g(q') += T(q', q), where weight[v, k] is not 0
//
// over all views and all k with kx^2 + ky^2 < (D/2)^2, kx >= 0, and of the column kx = 0 those with ky >= 0, so that a
// coefficient and its Friedel mate count once. With value = c y / s^2 and weight = c^2 / s^2 (image transform y, CTF c,
// noise variance s^2) n = d F + noise, F the volume's transform. g, the coverage, is how many coefficients a voxel has
// seen, whatever their CTF: it depends on poses alone.
//
// Grids are half-spectra too, as rfftn of a (P, P, P) volume has them, phases referring to the centre: axes [z, y, x]
// with frequency f at index f, or f + P if negative, and 0 <= x <= P/2. A point with q_x < 0 is taken to its mate,
// -q with the conjugate value, before it is spread. So a cell between x = -1 and x = 0 is filled through its mate,
// between 0 and 1, and of the plane x = 0 each voxel holds half of what it and its mate should hold together:
// the caller adds the mates (`hermitian` in cryosplat/backprojection.py). Corners that fall on frequency P/2 or -P/2
// share one voxel; no one looks at these.
//
// Accumulators are added to, not overwritten. On the CPU the order in which a voxel's contributions are added is fixed,
// so a result does not depend on the number of threads, bit for bit. A GPU may add in another order.
//
// Rotations must be rotations. One that is not finite, or so far from a rotation that points of its view may lie beyond
// P/2, makes NaN of its grid's frequency zero or of more of that grid; nothing is written elsewhere.
//
// Sums are of type Scalar. In float a voxel of a million terms has a relative error near 1e-4
// (measured in benchmarks/cpu.md), far below the noise.
#pragma once

#include <cstdint>

#include "stream.h"

namespace cryosplat {

struct InsertShape {
  std::int64_t grids;   // K
  std::int64_t views;   // V
  std::int64_t box;     // D, even
  std::int64_t padded;  // P
};

template <class Scalar>
struct InsertInputs {
  const Scalar* values;      // (V, D, D/2+1, 2)  real and imaginary part
  const Scalar* weights;     // (V, D, D/2+1)
  const Scalar* rotations;   // (V, 3, 3)
  const Scalar* shifts;      // (V, 2)            px
  const std::int64_t* grid;  // (V,)              which grid each view goes to, 0 <= grid < K
};

namespace cpu {

// accumulators: (K, P, P, P/2+1, 4), added to: n (real, imaginary), d, g.
template <class Scalar>
void insert(const InsertShape&, const InsertInputs<Scalar>&, Scalar* accumulators, int threads);

}  // namespace cpu

namespace cuda {

// The same on a GPU, without waiting and without memory of its own; the address of accumulators is divisible by 16.
// Returns null, or what the CUDA runtime has against the launch. `deterministic`: the same bits on every run, for equal
// V; else additions race, and rounding with them.
template <class Scalar>
const char* insert(const InsertShape&, const InsertInputs<Scalar>&, Scalar* accumulators, bool deterministic,
                   const Stream& stream);

}  // namespace cuda
}  // namespace cryosplat
