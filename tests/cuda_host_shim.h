// CUDA sources compiled for the host, unchanged: g++ -x c++ -include cuda_host_shim.h FILE.cu
//
// Blocks run one after the other. The threads of a block are coroutines on one thread of the machine: each runs up to
// the next barrier of its block or warp, then the next one does. So shared memory is static, atomics are plain
// operations, and nothing runs at the same time; races between barriers show only as results that change with
// `shim::backwards`, which turns round the order of threads and of blocks. A barrier, or an exchange between the lanes
// of a warp, that some who should never reach is an error. Shared memory is poisoned by nothing: it holds what the block
// before has left, as on a GPU.
#pragma once

// Its longjmp holds jumps from one stack to another for an error.
#undef _FORTIFY_SOURCE
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
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
  return error == cudaErrorLaunchFailure ? "threads wait at a barrier, or for lanes of their warp, that do not come"
                                         : "no block or more threads than one has";
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int) { return cudaErrorInvalidConfiguration; }  // there is one

inline void sincospif(float x, float* sine, float* cosine) {
  *sine = float(std::sin(M_PI * double(x)));
  *cosine = float(std::cos(M_PI * double(x)));
}

inline float sinpif(float x) { return float(std::sin(M_PI * double(x))); }

inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(M_PI * x);
  *cosine = std::cos(M_PI * x);
}

inline int __ffs(int word) { return __builtin_ffs(word); }
inline int __popc(unsigned word) { return __builtin_popcount(word); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }

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
using std::exp2;
using std::fabs;
using std::floor;
using std::fma;
using std::fmax;
using std::fmin;
using std::rint;
using std::sqrt;

namespace shim {

constexpr std::size_t stack_bytes = 64 << 10;
constexpr unsigned most_threads = 1024, lanes = 32;

struct Thread {
  ucontext_t first;  // entered once; afterwards threads change by jumps, which make no system call
  jmp_buf here;
  std::vector<char> stack;
  dim3 index;
  unsigned number;
  bool has_begun, has_ended;
};

// What the lanes of a warp tell each other. A round ends when all lanes that a mask names have come; the next round's
// words go to another buffer, since no one can complete it before all have read this one's.
struct Warp {
  std::uint64_t words[2][lanes];
  unsigned came = 0;
  unsigned round = 0;
};

inline bool backwards = false;
inline std::vector<Thread> threads(most_threads);
inline std::vector<Warp> warps(most_threads / lanes);
inline Thread* running = nullptr;
inline jmp_buf scheduler;
inline void (*body)(void*) = nullptr;
inline void* arguments = nullptr;
inline unsigned at_barrier, barriers, progress;

inline void pause() {
  if (!_setjmp(running->here)) _longjmp(scheduler, 1);
}

inline void enter() {
  body(arguments);
  running->has_ended = true;
  _longjmp(scheduler, 1);
}

inline void begin(Thread& thread, unsigned number) {
  thread.stack.resize(stack_bytes);
  thread.has_begun = thread.has_ended = false;
  thread.number = number;
  thread.index = dim3(number % blockDim.x, number / blockDim.x % blockDim.y, number / blockDim.x / blockDim.y);
}

inline void resume(Thread& thread) {
  running = &thread;
  threadIdx = thread.index;
  if (_setjmp(scheduler)) return;
  if (thread.has_begun) _longjmp(thread.here, 1);
  thread.has_begun = true;
  getcontext(&thread.first);
  thread.first.uc_stack.ss_sp = thread.stack.data();
  thread.first.uc_stack.ss_size = thread.stack.size();
  thread.first.uc_link = nullptr;
  makecontext(&thread.first, enter, 0);
  setcontext(&thread.first);
}

// Until all threads of the block have ended; false if those left wait for what cannot come: a barrier that others have
// passed by, a lane that has ended.
inline bool run_block() {
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  for (unsigned number = 0; number < count; ++number) begin(threads[number], number);
  for (Warp& warp : warps) warp = Warp();
  at_barrier = barriers = 0;
  for (;;) {
    unsigned ended = 0;
    const unsigned before = progress;
    for (unsigned turn = 0; turn < count; ++turn) {
      Thread& thread = threads[backwards ? count - 1 - turn : turn];
      if (!thread.has_ended) {
        resume(thread);
        progress += thread.has_ended;
      }
      ended += thread.has_ended;
    }
    if (ended == count) return true;
    if (progress == before) return false;
  }
}

// Gives a word to the warp, waits for those of all lanes in the mask, and returns these.
inline const std::uint64_t* exchange(unsigned mask, std::uint64_t word) {
  const unsigned lane = running->number % lanes, bit = 1u << lane;
  Warp& warp = warps[running->number / lanes];
  const unsigned round = warp.round;
  if (!(mask & bit)) __builtin_trap();  // CUDA leaves undefined what such a lane gets
  warp.words[round % 2][lane] = word;
  warp.came |= bit;
  if (warp.came == mask) {
    warp.came = 0;
    ++warp.round;
    ++progress;
  }
  while (warp.round == round) pause();
  return warp.words[round % 2];
}

template <class T>
std::uint64_t to_word(T value) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t), "a register or two");
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <class T>
T from_word(std::uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace shim

inline void __syncthreads() {
  const unsigned barrier = shim::barriers;
  if (++shim::at_barrier == blockDim.x * blockDim.y * blockDim.z) {
    shim::at_barrier = 0;
    ++shim::barriers;
    ++shim::progress;
  }
  while (shim::barriers == barrier) shim::pause();
}

inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::exchange(mask, 0); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const std::uint64_t* words = shim::exchange(mask, predicate != 0);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < shim::lanes; ++lane)
    if (mask & (1u << lane)) votes |= unsigned(words[lane]) << lane;
  return votes;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by) {
  const unsigned lane = shim::running->number % shim::lanes;
  return shim::from_word<T>(shim::exchange(mask, shim::to_word(value))[lane ^ unsigned(by)]);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = shim::running->number % shim::lanes;
  return shim::from_word<T>(shim::exchange(mask, shim::to_word(value))[lane >= by ? lane - by : lane]);
}

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
