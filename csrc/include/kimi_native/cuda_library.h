// The library of CUDA kernels (libkn_cuda), opened at first use.
//
// It exports, in plain C:
//   int32_t     kn_cuda_abi()             kCudaAbi of the headers it was built with
//   const char* kn_cuda_architectures()   "80 86 ...", those it has code for
//   const char* kn_cuda_device()          "" if the first device can be used, else why not
//   CudaOp      kn_cuda_op(name)          an op of namespace kn::cuda, or null
//   CudaOp      kn_cuda_workspace_bytes(name)   of an op with scratch: takes the op's Args and, for
//                                         `stream`, an int64_t that it writes the size to
#pragma once
#include <cstdint>
#include <string>

#define KN_CUDA_EXPORT __attribute__((visibility("default")))

namespace kn {

// To be raised whenever an Args struct changes (tests/simt/test_cuda_library.py notices).
constexpr int32_t kCudaAbi = 2;

// args: the op's Args struct. Returns "" or an error, whose first word is its kind ("value" for
// std::invalid_argument, "runtime" for std::runtime_error); valid until the thread's next call.
using CudaOp = const char* (*)(const void* args, void* stream);

// What was found beside this library; `error` says why there are no kernels to use.
struct CudaLibrary {
  std::string architectures;
  std::string error;
  CudaOp (*op)(const char* name) = nullptr;
  CudaOp (*workspace_bytes)(const char* name) = nullptr;
};

const CudaLibrary& cuda_library();

// Uses another library from now on: the kernels in the shim (tests), or another build of them; ""
// for the one beside this library again. Throws std::runtime_error if it cannot be opened.
void open_cuda_library(const std::string& path);

// One op of the library. Throw what the op throws (namespace kn::cuda in ops.h), and
// std::runtime_error if there is no such kernel or no device.
void cuda_call(const char* name, const void* args, void* stream);
int64_t cuda_workspace_bytes(const char* name, const void* args);

}  // namespace kn
