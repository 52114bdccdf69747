#include "kimi_native/cuda_library.h"

#include <dlfcn.h>

#include "core/error.h"

namespace kn {
namespace {

constexpr const char* kName = "libkn_cuda.so";

// The folder of the shared object that this code is in.
std::string own_folder() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(&own_folder), &info) || !info.dli_fname) return "";
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1);
}

template <typename F>
F find(void* library, const char* name) {
  void* symbol = dlsym(library, name);
  if (!symbol) throw std::runtime_error(concat("cuda: ", kName, " lacks ", name));
  return reinterpret_cast<F>(symbol);
}

std::string without_kind(const std::string& message) {
  return message.empty() ? message : message.substr(message.find(' ') + 1);
}

CudaLibrary open() {
  CudaLibrary result;
  void* library = dlopen((own_folder() + kName).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    result.error = "this build has no CUDA kernels";
    return result;
  }
  try {
    const int32_t abi = find<int32_t (*)()>(library, "kn_cuda_abi")();
    if (abi != kCudaAbi)
      throw std::runtime_error(concat("cuda: ", kName, " must be of this build (got interface ",
                                      abi, ", need ", kCudaAbi, ")"));
    result.architectures = find<const char* (*)()>(library, "kn_cuda_architectures")();
    result.error = without_kind(find<const char* (*)()>(library, "kn_cuda_device")());
  } catch (const std::runtime_error& e) {
    result.error = e.what();
  }
  return result;
}

}  // namespace

const CudaLibrary& cuda_library() {
  static const CudaLibrary library = open();
  return library;
}

}  // namespace kn
