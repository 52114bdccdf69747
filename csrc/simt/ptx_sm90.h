// The emulated twins of cuda/ptx_sm90.cuh, where each function is described.
#pragma once
#include <cstdint>

#include "cuda/tensor_map.h"
#include "simt/cuda.h"

namespace kn::ptx {

using cuda::Swizzle;
using cuda::TensorMap;

void mbarrier_init(void* barrier, int arrivals);
inline void mbarrier_init_fence() {}
void mbarrier_arrive(void* barrier);
void mbarrier_arrive_expect(void* barrier, int bytes);
void mbarrier_wait(void* barrier, int parity);

void fence_proxy_async();
void bulk_copy(void* to, const void* from, int bytes, void* barrier);
void tma_load_2d(void* to, const TensorMap* map, int column, int row, void* barrier);
inline void bulk_copy_once(void* to, const void* from, int bytes, void* barrier) {
  bulk_copy(to, from, bytes, barrier);
}
inline void tma_load_2d_once(void* to, const TensorMap* map, int column, int row, void* barrier) {
  tma_load_2d(to, map, column, row, barrier);
}

uint64_t matrix_descriptor(const void* p, Swizzle swizzle, int leading_bytes, int stride_bytes);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait_for(int groups_in_flight);
template <int N>
void wgmma_wait() {
  wgmma_wait_for(N);
}

template <int kCount>
void wgmma_settle(float (&)[kCount]) {}
inline void wgmma_settle(const uint32_t (&)[4]) {}

enum class Major { kK = 0, kN = 1 };

// a: four registers, or null for the descriptor a_shared.
void wgmma(float* d, int columns, const uint32_t* a, uint64_t a_shared, uint64_t b, Major b_major,
           bool accumulate);

template <int kN, Major kB = Major::kK>
void wgmma_m64k16_bf16(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  wgmma(d, kN, nullptr, a, b, kB, accumulate);
}
template <int kN, Major kB = Major::kK>
void wgmma_m64k16_bf16(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  wgmma(d, kN, a, 0, b, kB, accumulate);
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

}  // namespace kn::ptx
