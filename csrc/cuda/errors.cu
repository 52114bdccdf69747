// What is asked of the CUDA runtime, and its errors with the op's name. There are none in the shim.
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "cuda/device.cuh"

#if defined(__CUDACC__)
namespace kn::cuda {

void check(const char* op, cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

namespace {
bool is_set(const char* variable) {
  const char* value = std::getenv(variable);
  return value && std::strcmp(value, "1") == 0;
}
}  // namespace

void check_launch(const char* op, cudaStream_t stream) {
  static const bool wait = is_set("KIMI_NATIVE_SYNC");
  check(op, cudaGetLastError());
  if (!wait) return;
  cudaStreamCaptureStatus capturing;  // then there is nothing to wait for yet
  check(op, cudaStreamIsCapturing(stream, &capturing));
  if (capturing == cudaStreamCaptureStatusNone) check(op, cudaStreamSynchronize(stream));
}

void allow_shared(const char* op, const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> allowed;
  if (bytes <= 48 * 1024) return;  // what a kernel may have without asking
  int device = 0;
  check(op, cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  size_t& most = allowed[{device, kernel}];
  if (bytes <= most) return;
  check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes)));
  most = bytes;
}

int multiprocessors(const char* op) {
  int device = 0, count = 0;
  check(op, cudaGetDevice(&device));
  check(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

bool is_hopper(const char* op) {
  static const bool portable = is_set("KIMI_NATIVE_CUDA_PORTABLE");
  if (portable) return false;
  int device = 0, major = 0, minor = 0;
  check(op, cudaGetDevice(&device));
  check(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
}

}  // namespace kn::cuda
#endif
