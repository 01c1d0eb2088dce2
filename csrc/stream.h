// Where the kernels of the CUDA half run.
#pragma once

namespace cryosplat {
namespace cuda {

struct Stream {
  int device;    // as cudaSetDevice counts; all addresses of a call are of its memory
  void* handle;  // a cudaStream_t of that device
};

}  // namespace cuda
}  // namespace cryosplat
