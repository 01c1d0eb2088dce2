// Compiled once for each instruction set, with CRYOSPLAT_ISA naming it.
#include "kernels.h"

#include "covariance_kernels.h"
#include "insert_kernels.h"
#include "splat_kernels.h"
#include "voxelise_kernels.h"

namespace cryosplat {
namespace CRYOSPLAT_ISA {

template <class Scalar>
static cpu::Kernels<Scalar> kernels() {
  return {splat_forward<Scalar>,      splat_backward<Scalar>,      voxelise_forward<Scalar>,
          voxelise_backward<Scalar>, covariances_forward<Scalar>, covariances_backward<Scalar>,
          insert<Scalar>};
}

cpu::KernelTable kernel_table() { return {kernels<float>(), kernels<double>()}; }

}  // namespace CRYOSPLAT_ISA
}  // namespace cryosplat
