// Written in assembly: a compiler given intrinsics copies accumulators between registers, and the
// copies show (int8 dot products came out at 1/1.8 of the machine's rate).
#include "peak_loops.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <string>

#include "kimi_native/runtime.h"

namespace kn::bench {
namespace {

#if defined(__x86_64__)

constexpr int kAccumulators = 12;  // two a cycle at a latency of up to 6 cycles

// KN_12("instruction operands, %%", "zmm") repeats an instruction with accumulators 0 to 11.
#define KN_12(text, reg)                                                                        \
  text reg "0\n\t" text reg "1\n\t" text reg "2\n\t" text reg "3\n\t" text reg "4\n\t" text reg \
           "5\n\t" text reg "6\n\t" text reg "7\n\t" text reg "8\n\t" text reg "9\n\t" text reg \
           "10\n\t" text reg "11\n\t"

// A function that repeats `instruction a, b, accumulator`, with every 32 bits of a and b set to the
// two constants, and the accumulators to b.
#define KN_PEAK_LOOP(name, instruction, reg, a, b)                                              \
  void name(int64_t rounds) {                                                                   \
    asm volatile("vmovd %[a_bits], %%xmm12\n\t"                                               \
                 "vmovd %[b_bits], %%xmm13\n\t"                                               \
                 "vpbroadcastd %%xmm12, %%" reg "12\n\t"                                      \
                 "vpbroadcastd %%xmm13, %%" reg "13\n\t"                                      \
                 KN_12("vpbroadcastd %%xmm13, %%", reg)                                       \
                 "1:\n\t"                                                                     \
                 KN_12(instruction " %%" reg "13, %%" reg "12, %%", reg)                      \
                 "dec %[rounds]\n\t"                                                          \
                 "jnz 1b\n\t"                                                                 \
                 "vzeroupper"                                                                 \
                 : [rounds] "+r"(rounds)                                                      \
                 : [a_bits] "r"(a), [b_bits] "r"(b)                                           \
                 : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",    \
                   "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "cc"); \
  }

// fma213: accumulator = a * accumulator + b, which stays finite: a = 0.5, b = 1 in each format.
constexpr uint32_t kHalf = 0x3f000000, kOne = 0x3f800000;     // fp32
constexpr uint32_t kHalves = 0x38003800, kOnes = 0x3c003c00;  // two fp16
constexpr uint32_t kBf16Ones = 0x3f803f80;
constexpr uint32_t kBytes = 0x03fe02fd, kWords = 0x00030002;

KN_PEAK_LOOP(fp32_avx2, "vfmadd213ps", "ymm", kHalf, kOne)
KN_PEAK_LOOP(fp32_avx512, "vfmadd213ps", "zmm", kHalf, kOne)
KN_PEAK_LOOP(int16_dot_avx512, "vpdpwssd", "zmm", kWords, kWords)
KN_PEAK_LOOP(int8_dot_avx512, "vpdpbusd", "zmm", kBytes, kBytes)
#if defined(KN_BENCH_NEW_INSTRUCTIONS)  // what assemblers before 2.38 do not know
KN_PEAK_LOOP(int16_dot_avx2, "%{vex%} vpdpwssd", "ymm", kWords, kWords)
KN_PEAK_LOOP(int8_dot_avx2, "%{vex%} vpdpbusd", "ymm", kBytes, kBytes)
KN_PEAK_LOOP(fp16_avx512, "vfmadd213ph", "zmm", kHalves, kOnes)
KN_PEAK_LOOP(bf16_dot_avx512, "vdpbf16ps", "zmm", kBf16Ones, kBf16Ones)

constexpr int kTiles = 6;  // accumulators; tiles 6 and 7 are multiplied

struct alignas(64) TileConfig {  // palette 1: eight tiles of 16 rows of 64 bytes
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler itself never uses tile registers, hence no clobbers of them.
#define KN_AMX_LOOP(name, instruction)                                                      \
  void name(int64_t rounds) {                                                               \
    const TileConfig config;                                                                \
    asm volatile(                                                                           \
        "ldtilecfg %[config]\n\t"                                                           \
        "tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\t"                         \
        "tilezero %%tmm3\n\ttilezero %%tmm4\n\ttilezero %%tmm5\n\t"                         \
        "tilezero %%tmm6\n\ttilezero %%tmm7\n"                                              \
        "1:\n\t" instruction " %%tmm7, %%tmm6, %%tmm0\n\t" instruction                      \
        " %%tmm7, %%tmm6, %%tmm1\n\t" instruction " %%tmm7, %%tmm6, %%tmm2\n\t" instruction \
        " %%tmm7, %%tmm6, %%tmm3\n\t" instruction " %%tmm7, %%tmm6, %%tmm4\n\t" instruction \
        " %%tmm7, %%tmm6, %%tmm5\n\t"                                                       \
        "dec %[rounds]\n\t"                                                                 \
        "jnz 1b\n\t"                                                                        \
        "tilerelease"                                                                       \
        : [rounds] "+r"(rounds)                                                             \
        : [config] "m"(config)                                                              \
        : "cc");                                                                            \
  }
KN_AMX_LOOP(amx_bf16, "tdpbf16ps")
KN_AMX_LOOP(amx_int8, "tdpbsud")

// ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA: tile registers are granted per process, on demand.
bool ask_for_amx() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#endif  // KN_BENCH_NEW_INSTRUCTIONS
#endif  // __x86_64__

void fp32_baseline(int64_t rounds) {
  float a[16] = {};
  for (int64_t r = 0; r < rounds; ++r) {
    for (float& x : a) x = x * 0.5f + 1.0f;
    asm volatile("" ::"r"(a) : "memory");  // every round happens
  }
}

}  // namespace

std::vector<PeakLoop> peak_loops() {
  std::vector<PeakLoop> loops;
#if defined(__x86_64__)
  const std::vector<std::string> features = cpu_features();
  const auto has = [&](const char* name) {
    return std::find(features.begin(), features.end(), name) != features.end();
  };
  const auto add = [&](const char* unit, int macs, void (*loop)(int64_t)) {
    loops.push_back({unit, 2.0 * macs * kAccumulators, loop});
  };
  if (has("avx512f"))
    add("fp32", 16, fp32_avx512);
  else if (has("avx2") && has("fma"))
    add("fp32", 8, fp32_avx2);
  if (has("avx512vnni")) {
    add("int16_dot", 32, int16_dot_avx512);
    add("int8_dot", 64, int8_dot_avx512);
  }
#if defined(KN_BENCH_NEW_INSTRUCTIONS)
  if (!has("avx512vnni") && has("avxvnni")) {
    add("int16_dot", 16, int16_dot_avx2);
    add("int8_dot", 32, int8_dot_avx2);
  }
  if (has("avx512fp16")) add("fp16", 32, fp16_avx512);
  if (has("avx512bf16")) add("bf16_dot", 32, bf16_dot_avx512);
  if ((has("amx_bf16") || has("amx_int8")) && ask_for_amx()) {
    if (has("amx_bf16")) loops.push_back({"amx_bf16", 2.0 * 16 * 16 * 32 * kTiles, amx_bf16});
    if (has("amx_int8")) loops.push_back({"amx_int8", 2.0 * 16 * 16 * 64 * kTiles, amx_int8});
  }
#endif
#endif
  if (loops.empty()) loops.push_back({"fp32", 2.0 * 16, fp32_baseline});
  return loops;
}

}  // namespace kn::bench
