// Python's door to the compiled core. Arrays arrive as addresses: cryosplat/ops.py
// has checked shapes, types, devices and contiguity, and owns the memory.
#include <pybind11/pybind11.h>

#include "addresses.h"
#include "cuda/bindings.h"

namespace py = pybind11;
using namespace cryosplat;

namespace {

template <class Scalar>
void bind(py::module_& module) {
  using namespace pybind11::literals;
  typedef py::call_guard<py::gil_scoped_release> NoGil;
  module.def(
      "splat_forward",
      [](std::int64_t models, std::int64_t gaussians, std::int64_t views, std::int64_t box, Address means,
         Address covariances, Address amplitudes, Address rotations, Address shifts, Address model, double cutoff,
         Address images, int threads) {
        cpu::splat_forward<Scalar>({models, gaussians, views, box},
                                   inputs<Scalar>(means, covariances, amplitudes, rotations, shifts, model), cutoff,
                                   pointer<Scalar>(images), threads);
      },
      NoGil());
  module.def(
      "splat_backward",
      [](std::int64_t models, std::int64_t gaussians, std::int64_t views, std::int64_t box, Address means,
         Address covariances, Address amplitudes, Address rotations, Address shifts, Address model, double cutoff,
         Address grad_images, Address grad_means, Address grad_covariances, Address grad_amplitudes,
         Address grad_rotations, Address grad_shifts, int threads) {
        cpu::splat_backward<Scalar>({models, gaussians, views, box},
                                    inputs<Scalar>(means, covariances, amplitudes, rotations, shifts, model), cutoff,
                                    pointer<const Scalar>(grad_images),
                                    {pointer<Scalar>(grad_means), pointer<Scalar>(grad_covariances),
                                     pointer<Scalar>(grad_amplitudes), pointer<Scalar>(grad_rotations),
                                     pointer<Scalar>(grad_shifts)},
                                    threads);
      },
      NoGil());
  module.def(
      "voxelise_forward",
      [](std::int64_t models, std::int64_t gaussians, std::int64_t box, Address means, Address covariances,
         Address amplitudes, double cutoff, Address volumes, int threads) {
        cpu::voxelise_forward<Scalar>({models, gaussians, 0, box}, mixtures<Scalar>(means, covariances, amplitudes),
                                      cutoff, pointer<Scalar>(volumes), threads);
      },
      NoGil());
  module.def(
      "voxelise_backward",
      [](std::int64_t models, std::int64_t gaussians, std::int64_t box, Address means, Address covariances,
         Address amplitudes, double cutoff, Address grad_volumes, Address grad_means, Address grad_covariances,
         Address grad_amplitudes, int threads) {
        cpu::voxelise_backward<Scalar>(
            {models, gaussians, 0, box}, mixtures<Scalar>(means, covariances, amplitudes), cutoff,
            pointer<const Scalar>(grad_volumes),
            {pointer<Scalar>(grad_means), pointer<Scalar>(grad_covariances), pointer<Scalar>(grad_amplitudes), nullptr,
             nullptr},
            threads);
      },
      NoGil());
  module.def(
      "covariances_forward",
      [](std::int64_t count, Address quaternions, Address scales, Address covariances, int threads) {
        cpu::covariances_forward<Scalar>(count, pointer<const Scalar>(quaternions), pointer<const Scalar>(scales),
                                         pointer<Scalar>(covariances), threads);
      },
      NoGil());
  module.def(
      "covariances_backward",
      [](std::int64_t count, Address quaternions, Address scales, Address grad_covariances, Address grad_quaternions,
         Address grad_scales, int threads) {
        cpu::covariances_backward<Scalar>(count, pointer<const Scalar>(quaternions), pointer<const Scalar>(scales),
                                          pointer<const Scalar>(grad_covariances), pointer<Scalar>(grad_quaternions),
                                          pointer<Scalar>(grad_scales), threads);
      },
      NoGil());
  module.def(
      "insert",
      [](std::int64_t grids, std::int64_t views, std::int64_t box, std::int64_t padded, Address values, Address weights,
         Address rotations, Address shifts, Address grid, Address accumulators, int threads) {
        cpu::insert<Scalar>({grids, views, box, padded},
                            {pointer<const Scalar>(values), pointer<const Scalar>(weights),
                             pointer<const Scalar>(rotations), pointer<const Scalar>(shifts),
                             pointer<const std::int64_t>(grid)},
                            pointer<Scalar>(accumulators), threads);
      },
      NoGil());
}

#ifdef CRYOSPLAT_CUDA_ARCHITECTURES
void bind_cuda_half(py::module_& module) {
  module.attr("cuda_architectures") = CRYOSPLAT_CUDA_ARCHITECTURES;
  module.attr("cuda_version") = CRYOSPLAT_CUDA_VERSION;
  py::module_ cuda = module.def_submodule("cuda", "kernels on NVIDIA GPUs");
  cuda::bind<float>(cuda.def_submodule("float32", "kernels in single precision"));
  cuda::bind<double>(cuda.def_submodule("float64", "kernels in double precision"));
}
#else
void bind_cuda_half(py::module_& module) {
  module.attr("cuda_architectures") = "";
  module.attr("cuda_version") = "";
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled core of cryosplat; call it through cryosplat.ops.";
  module.def("instruction_set", &cpu::instruction_set, "avx512, avx2 or baseline: what the kernels use here");
  py::module_ single = module.def_submodule("float32", "kernels in single precision");
  py::module_ doubled = module.def_submodule("float64", "kernels in double precision");
  bind<float>(single);
  bind<double>(doubled);
  bind_cuda_half(module);
}
