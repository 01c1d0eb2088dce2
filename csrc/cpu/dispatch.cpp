// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace cryosplat {
namespace cpu {

namespace {

struct Choice {
  const char* name;
  KernelTable table;
};

bool is_wanted(const char* name, const char* wanted) { return !wanted || !*wanted || std::strcmp(name, wanted) == 0; }

Choice choose() {
#ifndef CRYOSPLAT_ONLY_BASELINE
  const char* wanted = std::getenv("CRYOSPLAT_ISA");
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512 && is_wanted("avx512", wanted)) return {"avx512", avx512::kernel_table()};
  if (has_avx2 && (is_wanted("avx2", wanted) || is_wanted("avx512", wanted))) return {"avx2", avx2::kernel_table()};
#endif
  return {"baseline", baseline::kernel_table()};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

template <class Scalar>
const Kernels<Scalar>& kernels();

template <>
const Kernels<float>& kernels<float>() {
  return choice().table.single_precision;
}

template <>
const Kernels<double>& kernels<double>() {
  return choice().table.double_precision;
}

}  // namespace

const char* instruction_set() { return choice().name; }

template <class Scalar>
void splat_forward(const SplatShape& shape, const SplatInputs<Scalar>& in, double cutoff, Scalar* images, int threads) {
  kernels<Scalar>().splat_forward(shape, in, cutoff, images, threads);
}

template <class Scalar>
void splat_backward(const SplatShape& shape, const SplatInputs<Scalar>& in, double cutoff, const Scalar* grad_images,
                    const SplatGradients<Scalar>& out, int threads) {
  kernels<Scalar>().splat_backward(shape, in, cutoff, grad_images, out, threads);
}

template <class Scalar>
void voxelise_forward(const SplatShape& shape, const SplatInputs<Scalar>& in, double cutoff, Scalar* volumes,
                      int threads) {
  kernels<Scalar>().voxelise_forward(shape, in, cutoff, volumes, threads);
}

template <class Scalar>
void voxelise_backward(const SplatShape& shape, const SplatInputs<Scalar>& in, double cutoff,
                       const Scalar* grad_volumes, const SplatGradients<Scalar>& out, int threads) {
  kernels<Scalar>().voxelise_backward(shape, in, cutoff, grad_volumes, out, threads);
}

template <class Scalar>
void covariances_forward(std::int64_t count, const Scalar* quaternions, const Scalar* scales, Scalar* covariances,
                         int threads) {
  kernels<Scalar>().covariances_forward(count, quaternions, scales, covariances, threads);
}

template <class Scalar>
void covariances_backward(std::int64_t count, const Scalar* quaternions, const Scalar* scales,
                          const Scalar* grad_covariances, Scalar* grad_quaternions, Scalar* grad_scales, int threads) {
  kernels<Scalar>().covariances_backward(count, quaternions, scales, grad_covariances, grad_quaternions, grad_scales,
                                         threads);
}

template <class Scalar>
void insert(const InsertShape& shape, const InsertInputs<Scalar>& in, Scalar* accumulators, int threads) {
  kernels<Scalar>().insert(shape, in, accumulators, threads);
}

#define CRYOSPLAT_INSTANTIATE(Scalar)                                                                               \
  template void splat_forward(const SplatShape&, const SplatInputs<Scalar>&, double, Scalar*, int);                 \
  template void splat_backward(const SplatShape&, const SplatInputs<Scalar>&, double, const Scalar*,                \
                               const SplatGradients<Scalar>&, int);                                                 \
  template void voxelise_forward(const SplatShape&, const SplatInputs<Scalar>&, double, Scalar*, int);              \
  template void covariances_forward(std::int64_t, const Scalar*, const Scalar*, Scalar*, int);                      \
  template void covariances_backward(std::int64_t, const Scalar*, const Scalar*, const Scalar*, Scalar*, Scalar*,   \
                                     int);                                                                          \
  template void insert(const InsertShape&, const InsertInputs<Scalar>&, Scalar*, int);                               \
  template void voxelise_backward(const SplatShape&, const SplatInputs<Scalar>&, double, const Scalar*,             \
                                  const SplatGradients<Scalar>&, int)
CRYOSPLAT_INSTANTIATE(float);
CRYOSPLAT_INSTANTIATE(double);
#undef CRYOSPLAT_INSTANTIATE

}  // namespace cpu
}  // namespace cryosplat
