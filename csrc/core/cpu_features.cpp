#include "core/cpu_features.h"

#include "kimi_native/runtime.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kn {
namespace {

#if defined(__x86_64__)
uint64_t xgetbv0() {
  uint32_t lo = 0, hi = 0;
  asm volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t(hi) << 32) | lo;
}

// Linux hands out the tile state on request only, once for all threads of the process.
bool request_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() {
  CpuFeatures f;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return f;
  const bool amd = b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
  f.far_prefetch = amd;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c >> 27 & 1, avx = c >> 28 & 1;
  if (!osxsave || !avx) return f;
  const uint64_t xcr0 = xgetbv0();
  const bool os_ymm = (xcr0 & 0x6) == 0x6;              // SSE and AVX state
  const bool os_zmm = os_ymm && (xcr0 & 0xe0) == 0xe0;  // opmask, upper ZMM halves, ZMM16-31
  const bool os_tile = (xcr0 & 0x60000) == 0x60000;     // AMX tile configuration and data
  f.fma = os_ymm && (c >> 12 & 1);
  f.f16c = os_ymm && (c >> 29 & 1);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = os_ymm && (b >> 5 & 1);
  f.avx512f = os_zmm && (b >> 16 & 1);
  f.avx512dq = os_zmm && (b >> 17 & 1);
  f.avx512bw = os_zmm && (b >> 30 & 1);
  f.avx512vl = os_zmm && (b >> 31 & 1);
  f.avx512vnni = os_zmm && (c >> 11 & 1);
  f.avx512vbmi = os_zmm && (c >> 1 & 1);
  f.avx512fp16 = os_zmm && (d >> 23 & 1);
  const bool tile = os_tile && (d >> 24 & 1) && request_tiles();
  f.amx_bf16 = tile && (d >> 22 & 1);
  f.amx_int8 = tile && (d >> 25 & 1);
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    f.avxvnni = os_ymm && (a >> 4 & 1);
    f.avx512bf16 = os_zmm && (a >> 5 & 1);
    f.fast_bf16_dots = f.avx512bf16 && amd;
  }
  return f;
}
#else
CpuFeatures detect() { return {}; }
#endif

}  // namespace

const CpuFeatures& detect_cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

std::vector<std::string> cpu_features() {
  const CpuFeatures& f = detect_cpu_features();
  const std::pair<const char*, bool> all[] = {{"avx2", f.avx2},
                                              {"fma", f.fma},
                                              {"f16c", f.f16c},
                                              {"avx512f", f.avx512f},
                                              {"avx512bw", f.avx512bw},
                                              {"avx512vl", f.avx512vl},
                                              {"avx512dq", f.avx512dq},
                                              {"avx512vnni", f.avx512vnni},
                                              {"avx512vbmi", f.avx512vbmi},
                                              {"avx512bf16", f.avx512bf16},
                                              {"avx512fp16", f.avx512fp16},
                                              {"avxvnni", f.avxvnni},
                                              {"amx_int8", f.amx_int8},
                                              {"amx_bf16", f.amx_bf16}};
  std::vector<std::string> names;
  for (const auto& [name, has] : all)
    if (has) names.emplace_back(name);
  return names;
}

}  // namespace kn
