// Mixtures laid out for vectors: one array per quantity, in double, padded to
// whole packets. Set-up runs in double, a packet of Gaussians at a time: it is
// a small part of the time, and in float the determinant of a thin tilted
// Gaussian would keep only a few digits.
#pragma once

#include <cstdlib>
#include <new>

#include "../splat.h"
#include "raster.h"

namespace cryosplat {
namespace CRYOSPLAT_ISA {

typedef Vector<double> Packet;
constexpr int packet = lanes<double>;

// A plain array; std::vector's functions would be shared between instruction sets by the linker.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t size) : data_(static_cast<T*>(std::calloc(size > 0 ? size : 1, sizeof(T)))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() { return data_; }
  const T* get() const { return data_; }
  T& operator[](std::int64_t i) { return data_[i]; }
  const T& operator[](std::int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// Ten numbers of each Gaussian: mean (3), covariance (6), amplitude.
constexpr int parameters = 10;

// Gaussians in blocks of whole packets; [model][parameter][gaussian].
class Mixtures {
 public:
  template <class Scalar>
  Mixtures(const SplatShape& shape, const SplatInputs<Scalar>& in)
      : gaussians_(shape.gaussians),
        padded_((shape.gaussians + packet - 1) / packet * packet),
        data_(shape.models * parameters * padded_) {
    for (std::int64_t m = 0; m < shape.models; ++m) {
      double* to = data_.get() + m * parameters * padded_;
      for (std::int64_t g = 0; g < padded_; ++g) {
        if (g < gaussians_) {
          const std::int64_t i = m * gaussians_ + g;
          for (int k = 0; k < 3; ++k) to[k * padded_ + g] = in.means[3 * i + k];
          for (int k = 0; k < 6; ++k) to[(3 + k) * padded_ + g] = in.covariances[6 * i + k];
          to[9 * padded_ + g] = in.amplitudes[i];
        } else {  // padding: a harmless Gaussian that is never drawn
          to[3 * padded_ + g] = to[6 * padded_ + g] = to[8 * padded_ + g] = 1.0;
        }
      }
    }
  }

  std::int64_t gaussians() const { return gaussians_; }
  std::int64_t padded() const { return padded_; }

  Vector3<Packet> mean(std::int64_t model, std::int64_t first) const {
    return {at(model, 0, first), at(model, 1, first), at(model, 2, first)};
  }
  Symmetric3<Packet> covariance(std::int64_t model, std::int64_t first) const {
    return {at(model, 3, first), at(model, 4, first), at(model, 5, first),
            at(model, 6, first), at(model, 7, first), at(model, 8, first)};
  }
  Packet amplitude(std::int64_t model, std::int64_t first) const { return at(model, 9, first); }

 private:
  Packet at(std::int64_t model, int parameter, std::int64_t first) const {
    return load<Packet>(data_.get() + (model * parameters + parameter) * padded_ + first);
  }

  std::int64_t gaussians_, padded_;
  Buffer<double> data_;
};

// Whole pixels of [mean - reach, mean + reach] inside 0..box-1. Clamped before the conversion,
// so that far or huge Gaussians stay within an int.
struct PixelRange {
  typename VectorOf<int, packet>::type first, last;
};

inline PixelRange pixel_range(Packet mean, Packet reach, std::int64_t box) {
  const Packet zero{}, size = zero + static_cast<double>(box);
  const Packet low = smaller(larger(mean - reach, zero), size);
  const Packet high = smaller(larger(mean + reach + 1.0, zero), size);
  typedef typename VectorOf<int, packet>::type Integers;
  const Integers down = __builtin_convertvector(low, Integers);
  const Packet back = __builtin_convertvector(down, Packet);
  PixelRange range;
  for (int k = 0; k < packet; ++k) range.first[k] = down[k] + (back[k] < low[k]);
  range.last = __builtin_convertvector(high, Integers) - 1;
  return range;
}

// A lane is usable if its planar covariance is positive definite and everything is finite.
inline auto is_proper(const Symmetric2<Packet>& c, Packet det, Packet mean_x, Packet mean_y, Packet amplitude) {
  const Packet zero{};
  const Packet everything = (mean_x + mean_y + amplitude + det) * 0.0;  // NaN if any is not finite
  return (c.xx > zero) & (c.yy > zero) & (det > zero) & (everything == zero);
}

}  // namespace CRYOSPLAT_ISA
}  // namespace cryosplat
