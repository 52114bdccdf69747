#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>

#include "core/cpu_features.h"
#include "core/error.h"
#include "kimi_native/runtime.h"

namespace kn::cpu {

namespace generic {
extern const Kernels table;
}
#if defined(KN_HAVE_AVX2)
namespace avx2 {
extern const Kernels table;
}
#endif
#if defined(KN_HAVE_AVX512)
namespace avx512 {
extern const Kernels table;
}
#endif
#if defined(KN_HAVE_AMX)
namespace amx {
extern const Kernels table;
}
#endif

#if defined(KN_HAVE_BF16_DOTS)
namespace bf16_dots {
extern const DotKernels table;
}
#endif

namespace {

bool has_avx512(const CpuFeatures& f) {
  return f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq && f.avx512vnni && f.avx2 && f.fma &&
         f.f16c;
}

struct Tier {
  const char* name;
  const Kernels* table;
  bool (*supported)(const CpuFeatures&);
};

#if defined(KN_HAVE_BF16_DOTS)
const Kernels avx512_bf16_table = [] {
  Kernels k = avx512::table;
  k.bf16_gemm = bf16_dots::table.bf16_gemm;
  k.mla_decode_bf16 = bf16_dots::table.mla_decode_bf16;
  return k;
}();
#endif

// Best first. AVX-512 without VNNI gets avx2: the integer kernels are the point of the tier.
const Tier kTiers[] = {
#if defined(KN_HAVE_AMX)
    {"amx", &amx::table,
     [](const CpuFeatures& f) { return has_avx512(f) && f.avx512vbmi && f.amx_bf16; }},
#endif
#if defined(KN_HAVE_BF16_DOTS)
    {"avx512_bf16", &avx512_bf16_table,
     [](const CpuFeatures& f) { return has_avx512(f) && f.fast_bf16_dots; }},
#endif
#if defined(KN_HAVE_AVX512)
    {"avx512", &avx512::table, has_avx512},
#endif
#if defined(KN_HAVE_AVX2)
    {"avx2", &avx2::table, [](const CpuFeatures& f) { return f.avx2 && f.fma && f.f16c; }},
#endif
    {"generic", &generic::table, [](const CpuFeatures&) { return true; }},
};

const Tier& find_tier(const std::string& name, const char* who) {
  std::string names;
  for (const Tier& t : kTiers) {
    if (!t.supported(detect_cpu_features())) continue;
    if (name == t.name) return t;
    names = names.empty() ? t.name : names + ", " + t.name;
  }
  throw std::runtime_error(
      concat("cpu: ", who, "=", name, " is not available here (supported: ", names, ")"));
}

const Tier& default_tier() {
  if (const char* forced = std::getenv("KIMI_NATIVE_CPU_ISA"); forced && *forced)
    return find_tier(forced, "KIMI_NATIVE_CPU_ISA");
  for (const Tier& t : kTiers)
    if (t.supported(detect_cpu_features())) return t;
  throw std::runtime_error("cpu: no kernel tier is supported here");
}

std::atomic<const Tier*> active{nullptr};

const Tier& active_tier() {
  const Tier* t = active.load(std::memory_order_acquire);
  if (!t) active.store(t = &default_tier(), std::memory_order_release);
  return *t;
}

}  // namespace

const Kernels& kernels() { return *active_tier().table; }

}  // namespace kn::cpu

namespace kn {

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const cpu::Tier& t : cpu::kTiers)
    if (t.supported(detect_cpu_features())) names.emplace_back(t.name);
  return names;
}

std::string active_isa() { return cpu::active_tier().name; }

void force_isa(const std::string& name) {
  cpu::active.store(name.empty() ? &cpu::default_tier() : &cpu::find_tier(name, "force_isa"),
                    std::memory_order_release);
}

}  // namespace kn
