// The emulated twins of cuda/ptx.cuh, where each function is described. Included through it.
#pragma once
#include <cstdint>

#include "simt/cuda.h"

namespace kn::ptx {

// ---- matrix products ----------------------------------------------------------------------------

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// ---- matrices out of shared memory --------------------------------------------------------------

void ldmatrix_x4(uint32_t (&r)[4], const void* row);
void ldmatrix_x2(uint32_t (&r)[2], const void* row);
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row);
void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row);

// ---- asynchronous copies ------------------------------------------------------------------------

void cp_async(void* to, const void* from, int bytes, bool ok);
inline void cp_async_16(void* to, const void* from, bool ok = true) { cp_async(to, from, 16, ok); }
inline void cp_async_8(void* to, const void* from, bool ok = true) { cp_async(to, from, 8, ok); }
inline void cp_async_4(void* to, const void* from, bool ok = true) { cp_async(to, from, 4, ok); }
void cp_async_commit();
void cp_async_wait_for(size_t groups_in_flight);
template <int N>
void cp_async_wait() {
  cp_async_wait_for(N);
}

// ---- barriers of part of a block ----------------------------------------------------------------

inline void barrier_sync(int id, int threads) {
  simt::sync_barrier(id, unsigned(threads), "barrier_sync");
}
inline void barrier_arrive(int id, int threads) {
  simt::arrive_barrier(id, unsigned(threads), "barrier_arrive");
}

// ---- global memory ------------------------------------------------------------------------------

uint4 load_streaming(const void* p);

inline int32_t load_acquire(const int32_t* p) {
  return std::atomic_ref<int32_t>(*const_cast<int32_t*>(p)).load(std::memory_order_acquire);
}
inline void store_release(int32_t* p, int32_t v) {
  std::atomic_ref<int32_t>(*p).store(v, std::memory_order_release);
}

// ---- bits and small floats ----------------------------------------------------------------------

template <int kTable>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r = 0;
  for (int i = 0; i < 8; ++i)
    if (kTable >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (4 * i) & 15;
    uint32_t byte = uint32_t(bytes >> (8 * (s & 7))) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;  // replicate the sign
    r |= byte << (8 * i);
  }
  return r;
}

inline uint16_t to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float from_bf16_bits(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

inline uint32_t to_bf16x2(float low, float high) {
  return uint32_t(to_bf16(high)) << 16 | to_bf16(low);
}

uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c);

inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace kn::ptx
