// What the processor and the operating system allow: CPUID says what the silicon has, XGETBV what
// the kernel saves.
#pragma once
#include <string>
#include <vector>

namespace kn {

struct CpuFeatures {
  bool avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false, avx512vnni = false;
  bool avx512vbmi = false, avx512bf16 = false, avx512fp16 = false, avxvnni = false;
  bool amx_int8 = false, amx_bf16 = false;
  // vdpbf16ps at the rate of vfmadd231ps, for twice the products: so on AMD (measured on Zen 5; on
  // Zen 4 torch's products by it were twice as fast as ours by multiply-adds), not on Intel, where
  // it has a quarter of that (Granite Rapids).
  bool fast_bf16_dots = false;
  // What comes from memory should be asked for well ahead, into L2: so on AMD (measured on Zen 4),
  // where the few lines on their way to L1 bound what a core reads. On Intel that loses.
  bool far_prefetch = false;
};

const CpuFeatures& detect_cpu_features();

}  // namespace kn
