// The contract of the spectral residual: from the spectra of projections to their losses, and to the spectra of the
// gradients. Symbols, memory and axes as in splat.h; besides them
//
//   B   particles of a batch; each is shown by W models, W = 1 or 2
//   N   images in memory, B of which are the batch's
//   k   (kx, ky) in cycles per box, of a half-spectrum as rfft2 gives it: 0 <= kx <= D/2, ky in FFT order; D >= 1
//
// With X the spectrum of a projection, Y = gain * the particle's image, w the whitening of its half (or 1), c its CTF
// (or 1), f = w c and r = f X - w Y,
//
//   loss = 1/D^2 sum_k p_k |r(k)|^2,   p_k = 2, or 1 where kx is its own mate (0, and D/2 for an even D)
//
// and X is replaced by f r: 2/D^2 of its inverse transform is the gradient of the loss with respect to the projection.
//
// The CTF is that of cryosplat/ctf.py, made from seven numbers of each particle (defocus u and v in A, astigmatism
// angle in rad, voltage in kV, Cs in mm, amplitude contrast, phase shift in rad) with the constants given:
//
//   lambda = numerator / sqrt(V + relativistic V^2), V in volts;   s = k / (D A/px)
//   c = sin( pi/2 lambda ((u + v) s^2 + (u - v) (cos 2a (sx^2 - sy^2) + sin 2a 2 sx sy))
//            - pi/2 Cs lambda^3 s^4 + phase shift + asin(amplitude contrast) )
//
// Its coefficients are formed in double, the phase in float: at the corners of the grid, where it passes a thousand
// radians, that costs what it costs in ctf.py.
//
// What is not finite makes its own coefficient and its view's loss so, and no other's. Results are the same bits on
// every run: sums are taken in a fixed order.
#pragma once

#include <cstdint>

#include "stream.h"

namespace cryosplat {

struct ResidualShape {
  std::int64_t models;     // W
  std::int64_t particles;  // B
  std::int64_t box;        // D
};

// A number in half precision (IEEE binary16), as it lies in memory.
struct Half {
  std::uint16_t bits;
};

struct CtfConstants {
  double numerator;     // A sqrt(V)
  double relativistic;  // 1/V
  double pixel_size;    // A
};

// Number is Half or float.
template <class Number>
struct ResidualInputs {
  const Number* images;      // (N, D, D/2+1, 2)  real and imaginary part
  const std::int64_t* rows;  // (B,)              which image is each particle's, 0 <= row < N
  const float* gain;         // (B,)
  const float* ctf;          // (B, 7), or null: no CTF
  const std::int64_t* half;  // (B,)              0 or 1
  const float* whitening;    // (2, D, D/2+1), or null
  CtfConstants constants;
};

namespace cuda {

// Bytes that `residual` works in.
std::int64_t residual_bytes(const ResidualShape&);

// On a GPU, without waiting and without memory of its own. spectra: (W, B, D, D/2+1, 2), X, overwritten with f r;
// losses: (W, B), written; workspace: at an address divisible by 256, as images and spectra are by 8. Returns null, or
// what the CUDA runtime has against the launch.
template <class Number>
const char* residual(const ResidualShape&, const ResidualInputs<Number>&, float* spectra, float* losses,
                     void* workspace, const Stream&);

}  // namespace cuda
}  // namespace cryosplat
