// Arrays as Python hands them to the core: by address.
#pragma once

#include <cstdint>

#include "splat.h"

namespace cryosplat {

typedef std::uintptr_t Address;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class Scalar>
SplatInputs<Scalar> mixtures(Address means, Address covariances, Address amplitudes) {
  return {pointer<const Scalar>(means), pointer<const Scalar>(covariances), pointer<const Scalar>(amplitudes),
          nullptr, nullptr, nullptr};
}

template <class Scalar>
SplatInputs<Scalar> inputs(Address means, Address covariances, Address amplitudes, Address rotations, Address shifts,
                           Address model) {
  SplatInputs<Scalar> in = mixtures<Scalar>(means, covariances, amplitudes);
  in.rotations = pointer<const Scalar>(rotations);
  in.shifts = pointer<const Scalar>(shifts);
  in.model = pointer<const std::int64_t>(model);
  return in;
}

}  // namespace cryosplat
