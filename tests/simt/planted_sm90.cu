// Deliberate bugs with Hopper's asynchronous copies and products, for the shim to find.
#include "cuda/ptx_sm90.cuh"
#include "programs.h"

namespace {

using namespace kn;        // NOLINT: a test program
using namespace kn::cuda;  // NOLINT

constexpr int kThreads = 128;
constexpr int kCopied = 8 * kThreads;  // bytes brought by two copies
constexpr int kMatrix = 1024;          // offset of a 64 x 16 matrix, no swizzle

struct HopperArgs {
  const int32_t* in;
  int32_t* out;
  int bug;
};

// Two bulk copies bring values and the same values shifted by one; the sum goes out. Bug 1: nobody
// waits for them. Bug 2: one thread waits, the others read. Bug 5: a byte count too high. Bug 6: no
// barrier behind the initialisation. Bug 7: an arrival too many. Bug 8: the block ends without
// waiting.
__device__ void copies(const HopperArgs& a, SharedPtr<char> shared) {
  const int i = int(threadIdx.x);
  const auto full = shared_cast<uint64_t>(shared);
  const auto values = shared_cast<int32_t>(shared + kMatrix);
  if (i == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init_fence();
  }
  if (a.bug != 6) __syncthreads();
  if (i == 64) {
    ptx::mbarrier_arrive_expect(full, a.bug == 5 ? kCopied + 128 : kCopied);
    for (int half = 0; half < 2; ++half)
      ptx::bulk_copy(shared + kMatrix + half * kThreads * 4, a.in, kThreads * 4, full);
    if (a.bug == 7) ptx::mbarrier_arrive(full);
    if (a.bug == 7) ptx::mbarrier_arrive(full);
  }
  if (a.bug == 8) return;
  if (a.bug != 1 && (a.bug != 2 || i == 7)) ptx::mbarrier_wait(full, 0);
  a.out[i] = values[i] + values[kThreads + (i + 1) % kThreads];
  __syncthreads();
}

// A product of zeros. Bug 3: written without a fence for the asynchronous proxy. Bug 4: no
// wgmma_fence. Variant 9 looks at the accumulators before it waits.
__device__ void multiply(const HopperArgs& a, SharedPtr<char> shared) {
  const int i = int(threadIdx.x);
  *shared_cast<uint4>(shared + kMatrix + i * 16) = make_uint4(0, 0, 0, 0);
  if (a.bug != 3) ptx::fence_proxy_async();
  __syncthreads();
  float d[8] = {};
  const uint64_t matrix = ptx::matrix_descriptor(shared + kMatrix, Swizzle::kNone, 1024, 128);
  if (a.bug != 4) ptx::wgmma_fence();
  ptx::wgmma_m64k16_bf16<16>(d, matrix, matrix, true);
  ptx::wgmma_commit();
  if (a.bug == 9) a.out[kThreads + i] = __float_as_int(d[i % 8]);
  ptx::wgmma_wait<0>();
  a.out[2 * kThreads + i] = __float_as_int(d[0]);
}

__global__ void hopper_kernel(HopperArgs a) {
  KN_SHARED(shared);
  const auto bytes = shared_at<char>(shared, 0);
  copies(a, bytes);
  if (a.bug != 8) multiply(a, bytes);
}

KN_PROGRAM(hopper, [](const Buffers& b) {
  launch({"hopper", dim3(1), dim3(kThreads), kMatrix + 2048, b.stream}, hopper_kernel,
         HopperArgs{static_cast<const int32_t*>(b.in), static_cast<int32_t*>(b.out), b.variant});
});

}  // namespace
