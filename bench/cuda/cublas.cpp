// The ceiling of bf16 products: cuBLAS, opened by name, so that the program needs neither its
// headers nor the library. KIMI_NATIVE_CUBLAS says where it lies if the loader does not know.
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "device_buffer.h"

namespace kn::bench::gpu {
namespace {

// Of cublas_api.h and library_types.h, where they are fixed by the ABI.
enum { kTransposed = 1, kPlain = 0, kR16Bf = 14, kCompute32F = 68, kDefaultAlgorithm = -1 };
using Create = int (*)(void** handle);
using SetStream = int (*)(void* handle, void* stream);
using GemmEx = int (*)(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
                       const void* alpha, const void* a, int a_type, int lda, const void* b,
                       int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                       int compute, int algorithm);

void* open_library() {
  const char* given = std::getenv("KIMI_NATIVE_CUBLAS");
  for (const char* name : {given, "libcublas.so.13", "libcublas.so.12", "libcublas.so"})
    if (name && *name)
      if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
  return nullptr;
}

}  // namespace

double matmul_flops(std::string& missing) {
  void* library = open_library();
  if (!library) {
    missing = "cuBLAS was not found (KIMI_NATIVE_CUBLAS names its file)";
    return 0.0;
  }
  const auto create = reinterpret_cast<Create>(dlsym(library, "cublasCreate_v2"));
  const auto set_stream = reinterpret_cast<SetStream>(dlsym(library, "cublasSetStream_v2"));
  const auto gemm = reinterpret_cast<GemmEx>(dlsym(library, "cublasGemmEx"));
  void* handle = nullptr;
  if (!create || !set_stream || !gemm || create(&handle) != 0 || set_stream(handle, stream())) {
    missing = "cuBLAS could not be started";
    return 0.0;
  }
  constexpr int kSize = 8192;
  Random random;
  const auto entry = [&] { return to_bf16(random.sign()); };
  const RandomBuffer<bf16> a(int64_t(kSize) * kSize, entry), b(int64_t(kSize) * kSize, entry);
  const DeviceBuffer<bf16> c(int64_t(kSize) * kSize);
  const float one = 1.0f, zero = 0.0f;
  int status = 0;
  const auto multiply = [&] {
    status |= gemm(handle, kTransposed, kPlain, kSize, kSize, kSize, &one, a.data(), kR16Bf, kSize,
                   b.data(), kR16Bf, kSize, &zero, c.data(), kR16Bf, kSize, kCompute32F,
                   kDefaultAlgorithm);
  };
  std::vector<double> times;
  for (int i = 0; i < 60; ++i) times.push_back(seconds(multiply));
  synchronize("cuBLAS");
  if (status != 0) {
    missing = "cuBLAS refused a bf16 product";
    return 0.0;
  }
  std::nth_element(times.begin() + 20, times.begin() + 40, times.end());  // 20 to wake the clocks
  return 2.0 * kSize * double(kSize) * kSize / times[40];
}

}  // namespace kn::bench::gpu
