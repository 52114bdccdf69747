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

CudaLibrary open(const std::string& path) {
  CudaLibrary result;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
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
    result.op = find<CudaOp (*)(const char*)>(library, "kn_cuda_op");
    result.workspace_bytes = find<CudaOp (*)(const char*)>(library, "kn_cuda_workspace_bytes");
    result.error = without_kind(find<const char* (*)()>(library, "kn_cuda_device")());
  } catch (const std::runtime_error& e) {
    result.error = e.what();
  }
  return result;
}

CudaLibrary& opened() {
  static CudaLibrary library = open(own_folder() + kName);
  return library;
}

void call(CudaOp op, const char* name, const void* args, void* other) {
  if (!op) throw std::runtime_error(concat(name, ": there is no CUDA kernel yet"));
  const std::string message = op(args, other);
  if (message.empty()) return;
  if (message.starts_with("value ")) throw std::invalid_argument(without_kind(message));
  throw std::runtime_error(without_kind(message));
}

const CudaLibrary& usable(const char* name) {
  const CudaLibrary& library = opened();
  if (!library.error.empty()) throw std::runtime_error(concat(name, ": ", library.error));
  return library;
}

}  // namespace

const CudaLibrary& cuda_library() { return opened(); }

void open_cuda_library(const std::string& path) {
  CudaLibrary library = open(path.empty() ? own_folder() + kName : path);
  if (!path.empty() && !library.op)
    throw std::runtime_error(concat("cuda: ", path, ": ", library.error));
  opened() = library;
}

void cuda_call(const char* name, const void* args, void* stream) {
  call(usable(name).op(name), name, args, stream);
}

int64_t cuda_workspace_bytes(const char* name, const void* args) {
  int64_t bytes = 0;
  call(usable(name).workspace_bytes(name), name, args, &bytes);
  return bytes;
}

}  // namespace kn
