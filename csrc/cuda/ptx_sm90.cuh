// Inline PTX of Hopper (sm_90a): mbarriers, bulk copies and TMA, wgmma. Twins in simt/ptx_sm90.h.
//
// An mbarrier is 8 bytes of shared memory that count arrivals and bytes of one phase after another;
// a wait names the parity of the phase it waits for (the first phase has parity 0).
//
// wgmma m64nNk16 (PTX ISA, "wgmma.mma_async"): warp w of four has rows 16w .. 16w + 15; with
// g = lane / 4 and t = lane % 4, d[4j + r] is row 16w + g + 8 (r / 2), column 8j + 2t + r % 2. An a
// from registers is laid out as in mma m16n8k16. Matrices in shared memory are k-major: rows of a
// (m) or b (n), k along a row, in groups of eight rows. A b may be n-major: rows of k, n along a
// row, so a k-major matrix is multiplied with its rows as columns, or with its columns.
#pragma once
#include "cuda/ptx.cuh"
#include "cuda/tensor_map.h"

#if !defined(__CUDACC__)
#include "simt/ptx_sm90.h"
#else

namespace kn::ptx {

using cuda::Swizzle;
using cuda::TensorMap;

// ---- mbarriers ----------------------------------------------------------------------------------

// By one thread; then mbarrier_init_fence, then a barrier, before others use them.
__device__ __forceinline__ void mbarrier_init(void* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(void* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// One arrival, and `bytes` that copies are going to bring in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect(void* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void mbarrier_wait(void* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- copies by the asynchronous proxy -----------------------------------------------------------

// What this thread has written to shared memory can be read by TMA and wgmma (after a barrier, if
// another thread issues them).
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// `bytes` (a multiple of 16, both sides 16-byte aligned) to shared memory; they count for
// `barrier`.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, void* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// The same of what is read once: the first to leave the L2 cache.
__device__ __forceinline__ void bulk_copy_once(void* to, const void* from, int bytes,
                                               void* barrier) {
  asm volatile(
      "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], policy;}" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// The box of `map` that starts at (column, row); all its bytes count for `barrier`. `to` is
// 128-byte aligned.
__device__ __forceinline__ void tma_load_2d(void* to, const TensorMap* map, int column, int row,
                                            void* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void tma_load_2d_once(void* to, const TensorMap* map, int column,
                                                 int row, void* barrier) {
  asm volatile(
      "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy;\n"
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], policy;}" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// ---- warpgroup matrix products ------------------------------------------------------------------

// A matrix in shared memory (PTX ISA, "matrix descriptor"), which lies there in rows as wide as its
// swizzle (16 bytes without one).
//   k-major   stride_bytes: from eight rows to the next eight. leading_bytes: without swizzle, from
//             eight columns to the next; else not used.
//   n-major   with a swizzle: leading_bytes from a row's width of columns to the next, stride_bytes
//             from eight rows (of k) to the next eight. Without one the two change places.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* p, Swizzle swizzle,
                                                      int leading_bytes, int stride_bytes) {
  const uint64_t mode = swizzle == Swizzle::k128  ? 1
                        : swizzle == Swizzle::k64 ? 2
                        : swizzle == Swizzle::k32 ? 3
                                                  : 0;
  return uint64_t((shared_address(p) & 0x3ffff) >> 4) |
         uint64_t((leading_bytes & 0x3ffff) >> 4) << 16 |
         uint64_t((stride_bytes & 0x3ffff) >> 4) << 32 | mode << 62;
}

// How b lies in shared memory: the immediate of the instruction.
enum class Major { kK = 0, kN = 1 };

// Before the first wgmma after registers it uses were written.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most N groups are in flight; before that, the accumulators must not be touched.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The compiler knows neither what a wait waits for nor what a fence orders. Behind wgmma_wait: d is
// read here and not earlier. Before wgmma_fence: d, or an a, has been written.
template <int kCount>
__device__ __forceinline__ void wgmma_settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
__device__ __forceinline__ void wgmma_settle(const uint32_t (&a)[4]) {
  asm volatile("" ::"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]) : "memory");
}

#define KN_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define KN_D8(i) KN_D4(i), KN_D4(i + 4)
#define KN_D16(i) KN_D8(i), KN_D8(i + 8)
#define KN_D32(i) KN_D16(i), KN_D16(i + 16)
#define KN_D64(i) KN_D32(i), KN_D32(i + 32)
#define KN_D128(i) KN_D64(i), KN_D64(i + 64)
#define KN_P8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define KN_P16 KN_P8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define KN_P32 KN_P16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define KN_P64                                                             \
  KN_P32                                                                   \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%" \
  "49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define KN_P128                                                                            \
  KN_P64                                                                                   \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%"                 \
  "81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%" \
  "102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%"  \
  "119,%120,%121,%122,%123,%124,%125,%126,%127"

// n columns = r registers; the operands behind the registers are %r, %(r + 1), ...
#define KN_WGMMA_SHARED(n, r, a_at, b_at, p_at, major_at)                                         \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" p_at ", 0; wgmma.mma_async.sync.aligned.m64n" #n \
               "k16.f32.bf16.bf16 {" KN_P##r "}, %" a_at ", %" b_at ", p, 1, 1, 0, %" major_at    \
                                             ";}"                                                 \
               : KN_D##r(0)                                                                       \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kB)))
#define KN_WGMMA_REGISTERS(n, r, a0, a1, a2, a3, b_at, p_at, major_at)                            \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" p_at ", 0; wgmma.mma_async.sync.aligned.m64n" #n \
               "k16.f32.bf16.bf16 {" KN_P##r "}, {%" a0 ",%" a1 ",%" a2 ",%" a3 "}, %" b_at       \
                                             ", p, 1, 1, %" major_at ";}"                         \
               : KN_D##r(0)                                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),        \
                 "n"(int(kB)))

// d = a * b (+ d if accumulate), 64 x kN, 16 along k; a and b are descriptors.
template <int kN, Major kB = Major::kK>
__device__ __forceinline__ void wgmma_m64k16_bf16(float (&d)[kN / 2], uint64_t a, uint64_t b,
                                                  bool accumulate) {
  static_assert(kN == 16 || kN == 32 || kN == 64 || kN == 128 || kN == 256);
  if constexpr (kN == 16) KN_WGMMA_SHARED(16, 8, "8", "9", "10", "11");
  if constexpr (kN == 32) KN_WGMMA_SHARED(32, 16, "16", "17", "18", "19");
  if constexpr (kN == 64) KN_WGMMA_SHARED(64, 32, "32", "33", "34", "35");
  if constexpr (kN == 128) KN_WGMMA_SHARED(128, 64, "64", "65", "66", "67");
  if constexpr (kN == 256) KN_WGMMA_SHARED(256, 128, "128", "129", "130", "131");
}

// The same with a from registers.
template <int kN, Major kB = Major::kK>
__device__ __forceinline__ void wgmma_m64k16_bf16(float (&d)[kN / 2], const uint32_t (&a)[4],
                                                  uint64_t b, bool accumulate) {
  static_assert(kN == 16 || kN == 32 || kN == 64 || kN == 128 || kN == 256);
  if constexpr (kN == 16) KN_WGMMA_REGISTERS(16, 8, "8", "9", "10", "11", "12", "13", "14");
  if constexpr (kN == 32) KN_WGMMA_REGISTERS(32, 16, "16", "17", "18", "19", "20", "21", "22");
  if constexpr (kN == 64) KN_WGMMA_REGISTERS(64, 32, "32", "33", "34", "35", "36", "37", "38");
  if constexpr (kN == 128) KN_WGMMA_REGISTERS(128, 64, "64", "65", "66", "67", "68", "69", "70");
  if constexpr (kN == 256)
    KN_WGMMA_REGISTERS(256, 128, "128", "129", "130", "131", "132", "133", "134");
}

#undef KN_WGMMA_SHARED
#undef KN_WGMMA_REGISTERS

// Registers per thread, for a warpgroup that needs fewer or more than it was launched with.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace kn::ptx
#endif
