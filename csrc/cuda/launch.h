// Starting a kernel, with what went wrong as words.
#pragma once

namespace cryosplat {
namespace cuda {

template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void* stream, Parameters... arguments) {
  void* addresses[] = {&arguments...};
  const cudaError_t status =
      cudaLaunchKernel(kernel, blocks, threads, addresses, 0, static_cast<cudaStream_t>(stream));
  if (status == cudaSuccess) return nullptr;
  (void)cudaGetLastError();  // told once
  return cudaGetErrorString(status);
}

}  // namespace cuda
}  // namespace cryosplat
