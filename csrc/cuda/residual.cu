// The spectral residual on GPUs. The contract stands in residual.h.
//
// `spectral_residual` reads and writes every coefficient once: a thread has four of one particle, makes their CTF and
// uses it for all models that show the particle. `prepare_phases` before it forms the CTF's coefficients in double, a
// thread a particle, so that neither doubles nor an arc sine burden the other's registers; `add_residuals` after it
// adds the blocks' sums in their order. Bytes are the floor: at D = 256 with two models and images in half precision
// 36 bytes a coefficient, 1.2 MB an image, besides a whitening that stays in the cache.
#include "../residual.h"

#include <type_traits>

#include "launch.h"
#include "warp.h"

namespace cryosplat {
namespace cuda {

namespace {

constexpr int threads_in_block = 256, coefficients_of_thread = 4;
constexpr int coefficients_of_block = threads_in_block * coefficients_of_thread;
constexpr int parameters_of_ctf = 7;

constexpr Index most_blocks = 2147483647;

// The phase of a CTF in half turns, which sinpif reduces exactly, is mean k^2 + spherical k^4 + cosine (kx^2 - ky^2)
// + sine 2 kx ky + constant.
struct Phase {
  float mean, spherical, cosine, sine, constant;
};

// What is the same for all particles.
struct Plan {
  Index particles, coefficients;  // B, D (D/2+1)
  int box, columns, chunks;       // D, D/2+1, blocks a particle
};

struct alignas(8) Complex {
  float real, imaginary;
};

struct alignas(4) HalfPair {
  Half real, imaginary;
};

__device__ inline float to_float(Half number) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(number.bits));
  return value;
#else
  const int exponent = number.bits >> 10 & 31, fraction = number.bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(float(fraction), -24)
                                     : std::ldexp(float(fraction + 1024), exponent - 25);
  return number.bits >> 15 ? -size : size;
#endif
}

__device__ inline Complex load(const Half* images, Index at) {
  const HalfPair pair = reinterpret_cast<const HalfPair*>(images)[at];
  return {to_float(pair.real), to_float(pair.imaginary)};
}

__device__ inline Complex load(const float* images, Index at) {
  return reinterpret_cast<const Complex*>(images)[at];
}

__device__ inline float ctf(const Phase& phase, int kx, int ky) {
  const float square = float(kx * kx + ky * ky);
  float half_turns = fmaf(phase.spherical, square, phase.mean) * square;
  half_turns = fmaf(phase.cosine, float(kx * kx - ky * ky), half_turns);
  half_turns = fmaf(phase.sine, float(2 * kx * ky), half_turns);
  return sinpif(half_turns + phase.constant);
}

__global__ void __launch_bounds__(warp_lanes)
    prepare_phases(Plan plan, const float* __restrict__ parameters, CtfConstants constants,
                   Phase* __restrict__ phases) {
  constexpr double pi = 3.141592653589793238462643383279502884;
  const Index particle = Index(blockIdx.x) * warp_lanes + threadIdx.x;
  if (particle >= plan.particles) return;
  const float* p = parameters + parameters_of_ctf * particle;
  const double u = p[0], v = p[1], angle = p[2], volts = 1e3 * double(p[3]), cs = 1e7 * double(p[4]);
  const double wavelength = constants.numerator / sqrt(volts + constants.relativistic * volts * volts);
  const double field = double(plan.box) * constants.pixel_size, per_a2 = 1 / (field * field);
  const double half_wavelength = 0.5 * wavelength * per_a2, astigmatism = half_wavelength * (u - v);
  double sine, cosine;
  sincospi(2 * angle / pi, &sine, &cosine);
  phases[particle] = {float(half_wavelength * (u + v)),
                      float(-0.5 * cs * wavelength * wavelength * wavelength * per_a2 * per_a2),
                      float(astigmatism * cosine), float(astigmatism * sine),
                      float((double(p[6]) + asin(double(p[5]))) / pi)};
}

template <int bits>
using NumberOf = std::conditional_t<bits == 16, Half, float>;

// Blocks: the chunks of each particle, one particle after the other. Sums: (W, B, chunks).
template <int bits, int models>
__global__ void __launch_bounds__(threads_in_block)
    spectral_residual(Plan plan, ResidualInputs<NumberOf<bits>> in, const Phase* __restrict__ phases,
                      Complex* __restrict__ spectra, float* __restrict__ sums) {
  constexpr int warps = threads_in_block / warp_lanes;
  __shared__ float of_warps[models][warps];
  const Index particle = blockIdx.x / unsigned(plan.chunks);
  const int chunk = int(blockIdx.x % unsigned(plan.chunks)), thread = int(threadIdx.x);
  const Index first = Index(chunk) * coefficients_of_block + thread;
  const Index image = in.rows[particle] * plan.coefficients;
  const Index weights = in.half[particle] * plan.coefficients;
  const float gain = in.gain[particle];
  const Phase phase = in.ctf ? phases[particle] : Phase{};

  // All of a thread's loads before its first store, so that they are on their way together.
  Complex x[models][coefficients_of_thread], y[coefficients_of_thread];
  float w[coefficients_of_thread];
#pragma unroll
  for (int turn = 0; turn < coefficients_of_thread; ++turn) {
    const Index at = first + turn * threads_in_block;
    if (at >= plan.coefficients) continue;
    y[turn] = load(in.images, image + at);
    w[turn] = in.whitening ? in.whitening[weights + at] : 1.0f;
#pragma unroll
    for (int model = 0; model < models; ++model)
      x[model][turn] = spectra[(model * plan.particles + particle) * plan.coefficients + at];
  }

  float sum[models] = {};
#pragma unroll
  for (int turn = 0; turn < coefficients_of_thread; ++turn) {
    const Index at = first + turn * threads_in_block;
    if (at >= plan.coefficients) continue;
    const int row = int(unsigned(at) / unsigned(plan.columns)), kx = int(at) - row * plan.columns;
    const int ky = 2 * row < plan.box ? row : row - plan.box;
    const float filter = in.ctf ? w[turn] * ctf(phase, kx, ky) : w[turn];
    const float scale = w[turn] * gain, times = kx == 0 || 2 * kx == plan.box ? 1.0f : 2.0f;
#pragma unroll
    for (int model = 0; model < models; ++model) {
      const Complex r = {filter * x[model][turn].real - scale * y[turn].real,
                         filter * x[model][turn].imaginary - scale * y[turn].imaginary};
      sum[model] += times * (r.real * r.real + r.imaginary * r.imaginary);
      spectra[(model * plan.particles + particle) * plan.coefficients + at] = {filter * r.real, filter * r.imaginary};
    }
  }

#pragma unroll
  for (int model = 0; model < models; ++model) {
#pragma unroll
    for (int step = warp_lanes / 2; step > 0; step /= 2) sum[model] += __shfl_xor_sync(all_lanes, sum[model], step);
    if (thread % warp_lanes == 0) of_warps[model][thread / warp_lanes] = sum[model];
  }
  __syncthreads();
  if (thread >= models) return;
  float total = 0;
  for (int warp = 0; warp < warps; ++warp) total += of_warps[thread][warp];
  sums[(thread * plan.particles + particle) * plan.chunks + chunk] = total;
}

// Threads: a loss each.
__global__ void __launch_bounds__(threads_in_block)
    add_residuals(Plan plan, Index count, const float* __restrict__ sums, float* __restrict__ losses) {
  const Index loss = Index(blockIdx.x) * threads_in_block + threadIdx.x;
  if (loss >= count) return;
  double total = 0;
  for (int chunk = 0; chunk < plan.chunks; ++chunk) total += double(sums[loss * plan.chunks + chunk]);
  losses[loss] = float(total / (double(plan.box) * double(plan.box)));
}

Plan plan_of(const ResidualShape& shape) {
  const int box = int(shape.box), columns = box / 2 + 1;
  const Index coefficients = Index(box) * columns;
  return {shape.particles, coefficients, box, columns, int(pieces(coefficients, coefficients_of_block))};
}

struct Workspace {
  Phase* phases;
  float* sums;
  Index bytes;

  Workspace(const ResidualShape& shape, void* base) {
    Places places(base);
    phases = places.next<Phase>(shape.particles);
    sums = places.next<float>(shape.models * shape.particles * plan_of(shape).chunks);
    bytes = places.bytes();
  }
};

}  // namespace

std::int64_t residual_bytes(const ResidualShape& shape) { return Workspace(shape, nullptr).bytes; }

template <class Number>
const char* residual(const ResidualShape& shape, const ResidualInputs<Number>& in, float* spectra, float* losses,
                     void* workspace, const Stream& stream) {
  if (shape.models == 0 || shape.particles == 0) return nullptr;
  if (shape.models > 2) return "more than two models show a particle";
  const Plan plan = plan_of(shape);
  if (plan.particles * plan.chunks > most_blocks) return "the batch has more coefficients than a launch takes";
  const Workspace at(shape, workspace);
  const char* message = nullptr;
  if (in.ctf) {
    message = launch(prepare_phases, dim3(unsigned(pieces(plan.particles, warp_lanes))), dim3(warp_lanes), stream, plan,
                     in.ctf, in.constants, at.phases);
  }
  if (message) return message;
  constexpr int bits = 8 * sizeof(Number);
  message = launch(shape.models == 1 ? spectral_residual<bits, 1> : spectral_residual<bits, 2>,
                   dim3(unsigned(plan.particles * plan.chunks)), dim3(threads_in_block), stream, plan, in,
                   static_cast<const Phase*>(at.phases), reinterpret_cast<Complex*>(spectra), at.sums);
  if (message) return message;
  const Index count = shape.models * shape.particles;
  return launch(add_residuals, dim3(unsigned(pieces(count, threads_in_block))), dim3(threads_in_block), stream, plan,
                count, static_cast<const float*>(at.sums), losses);
}

template const char* residual(const ResidualShape&, const ResidualInputs<Half>&, float*, float*, void*, const Stream&);
template const char* residual(const ResidualShape&, const ResidualInputs<float>&, float*, float*, void*, const Stream&);

}  // namespace cuda
}  // namespace cryosplat
