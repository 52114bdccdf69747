// What the processor and the operating system allow: CPUID says what the silicon has, XGETBV what
// the kernel saves.
#pragma once
#include <string>
#include <vector>

namespace kn {

struct CpuFeatures {
  bool avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false, avx512vnni = false;
  bool avx512bf16 = false, avx512fp16 = false, avxvnni = false, amx_int8 = false, amx_bf16 = false;
};

const CpuFeatures& detect_cpu_features();

}  // namespace kn
