// Python's door to the kernels on GPUs; cryosplat/cudaops.py goes through it. The host-run tests open it too.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../addresses.h"
#include "../insert.h"
#include "../residual.h"

namespace cryosplat {
namespace cuda {

// What CUDA has against a launch becomes a RuntimeError.
inline void require(const char* what, const char* message) {
  if (message) throw std::runtime_error(std::string(what) + " did not start on the GPU: " + message);
}

// In single precision alone: images are stored in it or in half of it.
inline void bind_residual(pybind11::module_& module) {
  using std::int64_t;
  module.def("residual_bytes", [](int64_t models, int64_t particles, int64_t box) {
    return residual_bytes({models, particles, box});
  });
  module.def(
      "residual",
      [](int64_t models, int64_t particles, int64_t box, Address images, bool is_half, Address rows, Address gain,
         Address ctf, Address half, Address whitening, double numerator, double relativistic, double pixel_size,
         Address spectra, Address losses, Address workspace, int device, Address stream) {
        const auto start = [&](auto number) {
          typedef decltype(number) Number;
          return residual<Number>(
              {models, particles, box},
              {pointer<const Number>(images), pointer<const int64_t>(rows), pointer<const float>(gain),
               pointer<const float>(ctf), pointer<const int64_t>(half), pointer<const float>(whitening),
               {numerator, relativistic, pixel_size}},
              pointer<float>(spectra), pointer<float>(losses), pointer<void>(workspace),
              {device, pointer<void>(stream)});
        };
        require("the spectral residual", is_half ? start(Half()) : start(float()));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

template <class Scalar>
void bind(pybind11::module_&& module) {
  using std::int64_t;
  typedef pybind11::call_guard<pybind11::gil_scoped_release> NoGil;
  module.def(
      "insert",
      [](int64_t grids, int64_t views, int64_t box, int64_t padded, Address values, Address weights, Address rotations,
         Address shifts, Address grid, Address accumulators, bool deterministic, int device, Address stream) {
        require("insertion", insert<Scalar>({grids, views, box, padded},
                                            {pointer<const Scalar>(values), pointer<const Scalar>(weights),
                                             pointer<const Scalar>(rotations), pointer<const Scalar>(shifts),
                                             pointer<const int64_t>(grid)},
                                            pointer<Scalar>(accumulators), deterministic,
                                            {device, pointer<void>(stream)}));
      },
      NoGil());
  module.def("splat_forward_bytes", [](int64_t models, int64_t gaussians, int64_t views, int64_t box) {
    return splat_forward_bytes<Scalar>({models, gaussians, views, box});
  });
  module.def(
      "splat_forward",
      [](int64_t models, int64_t gaussians, int64_t views, int64_t box, Address means, Address covariances,
         Address amplitudes, Address rotations, Address shifts, Address model, double cutoff, Address images,
         Address workspace, int device, Address stream) {
        require("splatting", splat_forward<Scalar>(
                                 {models, gaussians, views, box},
                                 inputs<Scalar>(means, covariances, amplitudes, rotations, shifts, model), cutoff,
                                 pointer<Scalar>(images), pointer<void>(workspace), {device, pointer<void>(stream)}));
      },
      NoGil());
  module.def("splat_backward_bytes", [](int64_t models, int64_t gaussians, int64_t views, int64_t box, bool poses) {
    return splat_backward_bytes<Scalar>({models, gaussians, views, box}, poses);
  });
  module.def(
      "splat_backward",
      [](int64_t models, int64_t gaussians, int64_t views, int64_t box, Address means, Address covariances,
         Address amplitudes, Address rotations, Address shifts, Address model, double cutoff, Address grad_images,
         Address grad_means, Address grad_covariances, Address grad_amplitudes, Address grad_rotations,
         Address grad_shifts, Address workspace, int device, Address stream) {
        require("the gradient of splatting",
                splat_backward<Scalar>({models, gaussians, views, box},
                                       inputs<Scalar>(means, covariances, amplitudes, rotations, shifts, model), cutoff,
                                       pointer<const Scalar>(grad_images),
                                       {pointer<Scalar>(grad_means), pointer<Scalar>(grad_covariances),
                                        pointer<Scalar>(grad_amplitudes), pointer<Scalar>(grad_rotations),
                                        pointer<Scalar>(grad_shifts)},
                                       pointer<void>(workspace), {device, pointer<void>(stream)}));
      },
      NoGil());
  module.def("voxelise_forward_bytes", [](int64_t models, int64_t gaussians, int64_t box) {
    return voxelise_forward_bytes<Scalar>({models, gaussians, 0, box});
  });
  module.def(
      "voxelise_forward",
      [](int64_t models, int64_t gaussians, int64_t box, Address means, Address covariances, Address amplitudes,
         double cutoff, Address volumes, Address workspace, int device, Address stream) {
        require("voxelising", voxelise_forward<Scalar>(
                                  {models, gaussians, 0, box}, mixtures<Scalar>(means, covariances, amplitudes), cutoff,
                                  pointer<Scalar>(volumes), pointer<void>(workspace), {device, pointer<void>(stream)}));
      },
      NoGil());
  module.def("voxelise_backward_bytes", [](int64_t models, int64_t gaussians, int64_t box) {
    return voxelise_backward_bytes<Scalar>({models, gaussians, 0, box});
  });
  module.def(
      "voxelise_backward",
      [](int64_t models, int64_t gaussians, int64_t box, Address means, Address covariances, Address amplitudes,
         double cutoff, Address grad_volumes, Address grad_means, Address grad_covariances, Address grad_amplitudes,
         Address workspace, int device, Address stream) {
        require("the gradient of voxelising",
                voxelise_backward<Scalar>({models, gaussians, 0, box},
                                          mixtures<Scalar>(means, covariances, amplitudes), cutoff,
                                          pointer<const Scalar>(grad_volumes),
                                          {pointer<Scalar>(grad_means), pointer<Scalar>(grad_covariances),
                                           pointer<Scalar>(grad_amplitudes), nullptr, nullptr},
                                          pointer<void>(workspace), {device, pointer<void>(stream)}));
      },
      NoGil());
  module.def(
      "covariances_forward",
      [](int64_t count, Address quaternions, Address scales, Address covariances, int device, Address stream) {
        require("composing covariances",
                covariances_forward<Scalar>(count, pointer<const Scalar>(quaternions), pointer<const Scalar>(scales),
                                            pointer<Scalar>(covariances), {device, pointer<void>(stream)}));
      },
      NoGil());
  module.def(
      "covariances_backward",
      [](int64_t count, Address quaternions, Address scales, Address grad_covariances, Address grad_quaternions,
         Address grad_scales, int device, Address stream) {
        require("the gradient of covariances",
                covariances_backward<Scalar>(count, pointer<const Scalar>(quaternions), pointer<const Scalar>(scales),
                                             pointer<const Scalar>(grad_covariances), pointer<Scalar>(grad_quaternions),
                                             pointer<Scalar>(grad_scales), {device, pointer<void>(stream)}));
      },
      NoGil());
  if constexpr (std::is_same_v<Scalar, float>) bind_residual(module);
}

}  // namespace cuda
}  // namespace cryosplat
