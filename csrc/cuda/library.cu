// What libkn_cuda exports: plain C, found by name, so that the library can be opened at first use
// and a machine without CUDA never needs it. In the shim the same functions lead to the same ops.
#include <map>
#include <stdexcept>

#include "cuda/device.cuh"
#include "cuda/machine.h"
#include "kimi_native/cuda_library.h"
#include "kimi_native/ops.h"

#if !defined(KN_CUDA_ARCHITECTURES)
#define KN_CUDA_ARCHITECTURES "none"
#endif

namespace kn::cuda {
namespace {

thread_local std::string message;

template <typename F>
const char* call(F f) {
  message.clear();
  try {
    f();
  } catch (const std::invalid_argument& e) {
    message = std::string("value ") + e.what();
  } catch (const std::exception& e) {
    message = std::string("runtime ") + e.what();
  }
  return message.c_str();
}

template <typename Args, void (*kOp)(const Args&, void*)>
const char* run(const void* args, void* stream) {
  return call([=] { kOp(*static_cast<const Args*>(args), stream); });
}

const std::map<std::string, CudaOp> ops = {
    {"int4_pack", run<Int4PackArgs, int4_pack>},
    {"int4_gemm", run<Int4GemmArgs, int4_gemm>},
    {"int4_grouped_gemm", run<Int4GroupedGemmArgs, int4_grouped_gemm>},
    {"int4_grouped_swiglu", run<Int4GroupedSwigluArgs, int4_grouped_swiglu>},
    {"bf16_gemm", run<Bf16GemmArgs, bf16_gemm>},
    {"int8_gemm", run<Int8GemmArgs, int8_gemm>},
    {"mla_schedule", run<MlaScheduleArgs, mla_schedule>},
    {"mla_decode", run<MlaDecodeArgs, mla_decode>},
    {"moe_route", run<MoeRouteArgs, moe_route>},
    {"moe_dispatch", run<MoeDispatchArgs, moe_dispatch>},
    {"moe_combine", run<MoeCombineArgs, moe_combine>},
    {"rms_norm", run<RmsNormArgs, rms_norm>},
    {"add_rms_norm", run<AddRmsNormArgs, add_rms_norm>},
    {"rope_append", run<RopeAppendArgs, rope_append>},
    {"swiglu", run<SwigluArgs, swiglu>},
    {"sample", run<SampleArgs, sample>},
};

// Writes the bytes of scratch that the op needs.
template <typename Args, int64_t (*kBytes)(const Args&)>
const char* workspace_bytes(const void* args, void* bytes) {
  return call([=] { *static_cast<int64_t*>(bytes) = kBytes(*static_cast<const Args*>(args)); });
}

const std::map<std::string, CudaOp> workspaces = {
    {"int4_gemm", workspace_bytes<Int4GemmArgs, int4_gemm_workspace_bytes>},
    {"int4_grouped_gemm", workspace_bytes<Int4GroupedGemmArgs, int4_grouped_gemm_workspace_bytes>},
    {"int4_grouped_swiglu",
     workspace_bytes<Int4GroupedSwigluArgs, int4_grouped_swiglu_workspace_bytes>},
    {"bf16_gemm", workspace_bytes<Bf16GemmArgs, bf16_gemm_workspace_bytes>},
    {"int8_gemm", workspace_bytes<Int8GemmArgs, int8_gemm_workspace_bytes>},
    {"mla_schedule", workspace_bytes<MlaScheduleArgs, mla_schedule_workspace_bytes>},
    {"mla_decode", workspace_bytes<MlaDecodeArgs, mla_decode_workspace_bytes>},
    {"sample", workspace_bytes<SampleArgs, sample_workspace_bytes>},
};

CudaOp find_in(const std::map<std::string, CudaOp>& all, const char* name) {
  const auto found = all.find(name);
  return found == all.end() ? nullptr : found->second;
}

}  // namespace

#if defined(__CUDACC__)

static const char* find_device() {
  return call([] {
    int driver = 0;  // stays so where there is none, of which cudaGetDeviceCount says "too old"
    check("cuda", cudaDriverGetVersion(&driver));
    check_driver(driver, CUDART_VERSION);
    int count = 0;
    check("cuda", cudaGetDeviceCount(&count));
    if (count == 0) throw std::runtime_error("cuda: no device");
    cudaDeviceProp properties;
    int best = 0;  // an older GPU beside a usable one does no harm
    for (int device = 1, least = 0; device < count; ++device) {
      int major = 0;
      check("cuda", cudaDeviceGetAttribute(&least, cudaDevAttrComputeCapabilityMajor, best));
      check("cuda", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
      if (major > least) best = device;
    }
    check("cuda", cudaGetDeviceProperties(&properties, best));
    check_architecture(properties.name, properties.major, properties.minor, KN_CUDA_ARCHITECTURES);
  });
}

#else

static const char* find_device() {
  return call([] {});
}

#endif

}  // namespace kn::cuda

extern "C" {

KN_CUDA_EXPORT int32_t kn_cuda_abi() { return kn::kCudaAbi; }
KN_CUDA_EXPORT const char* kn_cuda_architectures() { return KN_CUDA_ARCHITECTURES; }
KN_CUDA_EXPORT const char* kn_cuda_device() { return kn::cuda::find_device(); }

KN_CUDA_EXPORT kn::CudaOp kn_cuda_op(const char* name) {
  return kn::cuda::find_in(kn::cuda::ops, name);
}

KN_CUDA_EXPORT kn::CudaOp kn_cuda_workspace_bytes(const char* name) {
  return kn::cuda::find_in(kn::cuda::workspaces, name);
}

}  // extern "C"
