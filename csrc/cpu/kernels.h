// What one instruction set's copy of the kernels offers to the dispatcher.
#pragma once

#include "../insert.h"
#include "../splat.h"

namespace cryosplat {
namespace cpu {

template <class Scalar>
struct Kernels {
  void (*splat_forward)(const SplatShape&, const SplatInputs<Scalar>&, double, Scalar*, int);
  void (*splat_backward)(const SplatShape&, const SplatInputs<Scalar>&, double, const Scalar*,
                         const SplatGradients<Scalar>&, int);
  void (*voxelise_forward)(const SplatShape&, const SplatInputs<Scalar>&, double, Scalar*, int);
  void (*voxelise_backward)(const SplatShape&, const SplatInputs<Scalar>&, double, const Scalar*,
                            const SplatGradients<Scalar>&, int);
  void (*covariances_forward)(std::int64_t, const Scalar*, const Scalar*, Scalar*, int);
  void (*covariances_backward)(std::int64_t, const Scalar*, const Scalar*, const Scalar*, Scalar*, Scalar*, int);
  void (*insert)(const InsertShape&, const InsertInputs<Scalar>&, Scalar*, int);
};

struct KernelTable {
  Kernels<float> single_precision;
  Kernels<double> double_precision;
};

}  // namespace cpu

namespace baseline {
cpu::KernelTable kernel_table();
}
namespace avx2 {
cpu::KernelTable kernel_table();
}
namespace avx512 {
cpu::KernelTable kernel_table();
}
}  // namespace cryosplat
