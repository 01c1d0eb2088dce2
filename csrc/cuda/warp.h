// A warp's and a group's common arithmetic.
#pragma once

#include <cstdint>

namespace cryosplat {
namespace cuda {

namespace {

typedef std::int64_t Index;

constexpr int warp_lanes = 32;
constexpr unsigned all_lanes = 0xffffffffu;

// Lanes that share a Gaussian where gradients are gathered, four columns each: 16 columns, which most footprints fill by
// two thirds or more. Larger groups would spend more on what is done once for a footprint than on its pixels.
constexpr int group_lanes = 4;
constexpr int groups_in_warp = warp_lanes / group_lanes;

// Of a block along x. Unsigned, so that a remainder is one instruction.
__device__ inline int warp_of_block() { return int(threadIdx.x / unsigned(warp_lanes)); }
__device__ inline int lane_of_warp() { return int(threadIdx.x % unsigned(warp_lanes)); }
__device__ inline int group_of_warp() { return lane_of_warp() / group_lanes; }
__device__ inline int group_of_block() { return int(threadIdx.x / unsigned(group_lanes)); }
__device__ inline int lane_of_group() { return int(threadIdx.x % unsigned(group_lanes)); }

inline __host__ __device__ Index pieces(Index count, Index of) { return (count + of - 1) / of; }

inline __host__ __device__ int larger_of(int a, int b) { return a > b ? a : b; }
inline __host__ __device__ int smaller_of(int a, int b) { return a < b ? a : b; }

// 2^x. In float the hardware's, whose error of 2 units in the last place is below what rounding x costs.
__device__ inline float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2(x);
#endif
}
__device__ inline double exp2_of(double x) { return exp2(x); }

// Products and sums that the compiler must not fuse.
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }

// Sum over the lanes of each group, in every lane.
template <class T>
__device__ T sum_of_group(T value) {
#pragma unroll
  for (int step = group_lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(all_lanes, value, step);
  return value;
}

// Sum of lanes that are equal within their groups, over the groups of a warp.
template <class T>
__device__ T sum_over_groups(T value) {
#pragma unroll
  for (int step = group_lanes; step < warp_lanes; step *= 2) value += __shfl_xor_sync(all_lanes, value, step);
  return value;
}

// The sums over its group of values[2 lane] and values[2 lane + 1], in each lane: 6 exchanges where sum_of_group of 8
// values would take 16.
template <class T>
struct Two {
  T first, second;
};

template <class T>
__device__ Two<T> transposed_sum_of_group(const T (&values)[2 * group_lanes]) {
  static_assert(group_lanes == 4, "two exchanges");
  T half[4], quarter[2];
  const bool bit2 = lane_of_group() & 2, bit1 = lane_of_group() & 1;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const T keep = bit2 ? values[k + 4] : values[k], give = bit2 ? values[k] : values[k + 4];
    half[k] = keep + __shfl_xor_sync(all_lanes, give, 2);
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const T keep = bit1 ? half[k + 2] : half[k], give = bit1 ? half[k] : half[k + 2];
    quarter[k] = keep + __shfl_xor_sync(all_lanes, give, 1);
  }
  return {quarter[0], quarter[1]};
}

// Places in a workspace, each at an address that any vector access may use.
class Places {
 public:
  explicit Places(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* next(Index count) {
    T* place = reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += pieces(count * Index(sizeof(T)), 256) * 256;
    return place;
  }
  Index bytes() const { return bytes_; }

 private:
  char* base_;
  Index bytes_ = 0;
};

}  // namespace

}  // namespace cuda
}  // namespace cryosplat
