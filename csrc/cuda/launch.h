// Starting kernels, with what went wrong as words.
#pragma once

#include "../stream.h"

namespace cryosplat {
namespace cuda {

// The tensors' device, for as long as a call lasts: this runtime is not PyTorch's, and may think another one current.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess && before_ != device) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~OnDevice() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

// Null, or what the runtime has against the launch. Waits for nothing.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, const Stream& stream,
                   Parameters... arguments) {
  void* addresses[] = {&arguments...};
  const OnDevice on(stream.device);
  cudaError_t status = on.status();
  if (status == cudaSuccess)
    status = cudaLaunchKernel(kernel, blocks, threads, addresses, 0, static_cast<cudaStream_t>(stream.handle));
  if (status == cudaSuccess) return nullptr;
  (void)cudaGetLastError();  // told once
  return cudaGetErrorString(status);
}

}  // namespace cuda
}  // namespace cryosplat
