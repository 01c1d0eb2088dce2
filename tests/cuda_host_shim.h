// CUDA sources compiled for the host, unchanged: g++ -x c++ -include cuda_host_shim.h FILE.cu
//
// Blocks run one after the other. The threads of a block are coroutines on one thread of the machine: each runs up to
// the next barrier, then the next one does. So shared memory is static, atomics are plain operations, and nothing runs
// at the same time; races between barriers show only as results that change with `shim::backwards`, which turns round
// the order of threads and of blocks. A barrier that only some threads of a block reach is an error.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "some threads of a block ended before a barrier that others reached"
                                         : "no block or more threads than one has";
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline void sincospif(float x, float* sine, float* cosine) {
  *sine = float(std::sin(M_PI * double(x)));
  *cosine = float(std::cos(M_PI * double(x)));
}

inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(M_PI * x);
  *cosine = std::cos(M_PI * x);
}

inline int __ffs(int word) { return __builtin_ffs(word); }

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

inline unsigned atomicOr(unsigned* to, unsigned value) {
  const unsigned before = *to;
  *to |= value;
  return before;
}

using std::ceil;
using std::fabs;
using std::floor;
using std::fmax;
using std::fmin;
using std::rint;

namespace shim {

constexpr std::size_t stack_bytes = 64 << 10;
constexpr unsigned most_threads = 1024;

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  dim3 index;
  bool has_ended;
};

inline bool backwards = false;
inline std::vector<Thread> threads(most_threads);
inline Thread* running = nullptr;
inline ucontext_t scheduler;
inline void (*body)(void*) = nullptr;
inline void* arguments = nullptr;

inline void enter() {
  body(arguments);
  running->has_ended = true;
  swapcontext(&running->context, &scheduler);
}

inline void begin(Thread& thread, unsigned number) {
  thread.stack.resize(stack_bytes);
  thread.has_ended = false;
  thread.index = dim3(number % blockDim.x, number / blockDim.x % blockDim.y, number / blockDim.x / blockDim.y);
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = thread.stack.size();
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, enter, 0);
}

// From barrier to barrier until all threads of the block have ended; false if they do not end together.
inline bool run_block() {
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  for (unsigned number = 0; number < count; ++number) begin(threads[number], number);
  for (;;) {
    unsigned ended = 0;
    for (unsigned turn = 0; turn < count; ++turn) {
      running = &threads[backwards ? count - 1 - turn : turn];
      threadIdx = running->index;
      swapcontext(&scheduler, &running->context);
      ended += running->has_ended;
    }
    if (ended == count) return true;
    if (ended) return false;
  }
}

}  // namespace shim

inline void __syncthreads() { swapcontext(&shim::running->context, &shim::scheduler); }

namespace shim {

template <class Kernel, class... Parameters>
struct Call {
  Kernel kernel;
  void** addresses;

  template <std::size_t... Place>
  void apply(std::index_sequence<Place...>) const {
    kernel(*static_cast<Parameters*>(addresses[Place])...);
  }
  static void run(void* call) { static_cast<const Call*>(call)->apply(std::index_sequence_for<Parameters...>()); }
};

}  // namespace shim

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void** addresses, std::size_t,
                             cudaStream_t) {
  typedef shim::Call<void (*)(Parameters...), Parameters...> Call;
  Call call{kernel, addresses};
  shim::body = &Call::run;
  shim::arguments = &call;
  gridDim = blocks;
  blockDim = threads;
  const std::uint64_t count = std::uint64_t(blocks.x) * blocks.y * blocks.z;
  const std::uint64_t in_block = std::uint64_t(threads.x) * threads.y * threads.z;
  if (count == 0 || blocks.x > 2147483647 || blocks.y > 65535 || blocks.z > 65535 || in_block == 0 ||
      in_block > shim::most_threads) {
    return cudaErrorInvalidConfiguration;
  }
  for (std::uint64_t turn = 0; turn < count; ++turn) {
    const std::uint64_t number = shim::backwards ? count - 1 - turn : turn;
    blockIdx = dim3(unsigned(number % blocks.x), unsigned(number / blocks.x % blocks.y),
                    unsigned(number / blocks.x / blocks.y));
    if (!shim::run_block()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
