// Kernels with one deliberate bug each (and their correct forms), for the shim to find. The bugs
// are those that hide best: most give right numbers on most runs.
#include "cuda/ptx.cuh"
#include "cuda/ptx_sm90.cuh"
#include "programs.h"

namespace {

using namespace kn;        // NOLINT: a test program
using namespace kn::cuda;  // NOLINT

constexpr int kThreads = 128;

struct In {
  const int32_t* in;
  int32_t* out;
  int bug;
};

// Reverses values through shared memory. Bug 1: no barrier between the stores and the loads.
__global__ void reverse_kernel(In a) {
  KN_SHARED(shared);
  const auto values = shared_at<int32_t>(shared, 0);
  const int i = int(threadIdx.x);
  values[i] = a.in[i];
  if (a.bug != 1) __syncthreads();
  a.out[i] = values[kThreads - 1 - i];
}

// Sums in turns through one buffer. Bug 1: the barrier before the buffer is used again is missing.
__global__ void reuse_kernel(In a) {
  KN_SHARED(shared);
  const auto values = shared_at<int32_t>(shared, 0);
  const int i = int(threadIdx.x);
  int32_t sum = 0;
  for (int turn = 0; turn < 4; ++turn) {
    values[i] = a.in[i] + turn;
    __syncthreads();
    sum += values[(i + 32) % kThreads];
    if (a.bug != 1) __syncthreads();
  }
  a.out[i] = sum;
}

// All threads add to one word in turn, one warp after the other. Bug 1: without waiting for the
// warp before; in any order of whole warps the sum is right, so the numbers do not tell.
__global__ void ordered_kernel(In a) {
  KN_SHARED(shared);
  const auto sum = shared_at<int32_t>(shared, 0);
  const int warp = int(threadIdx.x) / 32;
  if (threadIdx.x == 0) sum[0] = 0;
  __syncthreads();
  for (int turn = 0; turn < kThreads / 32; ++turn) {
    if (turn == warp && threadIdx.x % 32 == 0) sum[0] += a.in[warp];
    if (a.bug != 1) __syncthreads();
  }
  __syncthreads();
  if (threadIdx.x == 0) a.out[0] = sum[0];
}

// A pipeline of cp.async. Bug 1: it waits for one group too few. Bug 2: the barrier behind the wait
// is missing, though a thread reads what its neighbour copied. Bug 3: no wait at all.
__global__ void copy_kernel(In a) {
  KN_SHARED(shared);
  const auto values = shared_at<int32_t>(shared, 0);
  const int i = int(threadIdx.x);
  for (int stage = 0; stage < 2; ++stage) {
    ptx::cp_async_16(values + (stage * kThreads + i) * 4, a.in + (stage * kThreads + i) * 4);
    ptx::cp_async_commit();
  }
  int32_t sum = 0;
  for (int stage = 0; stage < 2; ++stage) {
    if (a.bug == 1)
      ptx::cp_async_wait<1>();
    else if (a.bug != 3)
      ptx::cp_async_wait<0>();
    if (a.bug != 2) __syncthreads();
    for (int j = 0; j < 4; ++j) sum += values[(stage * kThreads + (i + 1) % kThreads) * 4 + j];
  }
  a.out[i] = sum;
}

// Bug 1: half of the threads take another way around the barrier.
__global__ void divergent_kernel(In a) {
  const int i = int(threadIdx.x);
  if (a.bug != 1 || i < 40) __syncthreads();
  a.out[i] = a.in[i];
  if (a.bug == 1 && i >= 40) ptx::barrier_sync(3, kThreads);
}

// Bug 1: a lane leaves before the shuffle. Bug 2: two lanes meet in different operations.
__global__ void lost_lane_kernel(In a) {
  const int i = int(threadIdx.x);
  int32_t v = a.in[i];
  if (a.bug == 1 && i == 5) return;
  if (a.bug == 2 && i == 5)
    v = int32_t(__ballot_sync(0xffffffffu, v));
  else
    v = __shfl_sync(0xffffffffu, v, 7);
  a.out[i] = v;
}

// Bug 1: one element behind shared memory. Bug 2: one behind the global input. Bug 3: one before
// it. Bug 4: behind the global output.
__global__ void bounds_kernel(In a) {
  KN_SHARED(shared);
  const auto values = shared_at<int32_t>(shared, 0);
  const int i = int(threadIdx.x);
  values[a.bug == 1 ? i + 1 : i] = a.in[a.bug == 2 ? i + 1 : a.bug == 3 ? i - 1 : i];
  __syncthreads();
  a.out[a.bug == 4 ? i + 1 : i] = values[i];
}

// Bug 1: ldmatrix from an address that is not a multiple of 16. Bug 2: a 16-byte load through a
// pointer that is not. Bug 3: the same in shared memory. Bug 4: cp.async.
__global__ void misaligned_kernel(In a) {
  KN_SHARED(shared);
  const int i = int(threadIdx.x);
  const auto row = shared_at<int4>(shared, i * 16 + (a.bug == 3 && i == 9 ? 8 : 0));
  const auto* from = reinterpret_cast<const int4*>(a.in + (a.bug == 2 ? 1 : 0));
  if (a.bug == 4) {
    ptx::cp_async_16(shared_at<int4>(shared, i * 16), a.in + 2);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  }
  const int4 loaded = *from;
  *row = loaded;
  __syncthreads();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, shared_at<int4>(shared, i * 16 + (a.bug == 1 ? 8 : 0)));
  a.out[i] = int32_t(r[0] ^ r[1] ^ r[2] ^ r[3]);
}

__device__ __attribute__((noinline)) int32_t deep(int32_t value, int depth) {
  volatile int32_t local[64];
  local[value % 64] = value;
  return depth == 0 ? value : deep(value + 1, depth - 1) + local[value % 64];
}

// A block waits for its predecessor. Bug 1: nobody tells the second one.
__global__ void chain_kernel(In a) {
  const int b = int(blockIdx.x);
  if (threadIdx.x == 0) {
    spin_until([&] { return ptx::load_acquire(a.out) == b; });
    if (a.bug != 1 || b != 1) ptx::store_release(a.out, b + 1);
  }
}

// Bank conflicts: a column of a 32 x 32 matrix, in rows of 32 words (bug 1) or 33.
__global__ void banks_kernel(In a) {
  KN_SHARED(shared);
  const auto values = shared_at<int32_t>(shared, 0);
  const int i = int(threadIdx.x), pitch = a.bug == 1 ? 32 : 33;
  values[i % 32 * pitch] = a.in[i % 32];
  __syncwarp();
  a.out[i] = values[i % 32 * pitch];
}

// Bug 1: more local data than a stack holds.
__global__ void stack_kernel(In a) {
  const int i = int(threadIdx.x);
  a.out[i] = a.in[i];
  if (a.bug == 1) a.out[i] = deep(a.in[i], 1000);
}

template <int kSharedBytes, int kBlocks = 1, int kBlockThreads = kThreads>
void run(void (*kernel)(In), const char* name, const Buffers& b) {
  launch({name, dim3(kBlocks), dim3(kBlockThreads), kSharedBytes, b.stream}, kernel,
         In{static_cast<const int32_t*>(b.in), static_cast<int32_t*>(b.out), b.variant});
}

#define KN_PLANTED(name, ...) \
  KN_PROGRAM(name, [](const Buffers& b) { run<__VA_ARGS__>(name##_kernel, #name, b); })

KN_PLANTED(reverse, kThreads * 4);
KN_PLANTED(reuse, kThreads * 4);
KN_PLANTED(ordered, 4);
KN_PLANTED(copy, 2 * kThreads * 16);
KN_PLANTED(divergent, 0);
KN_PLANTED(lost_lane, 0, 1, 32);
KN_PLANTED(bounds, kThreads * 4);
KN_PLANTED(misaligned, kThreads * 16 + 16);
KN_PLANTED(chain, 0, 4, 32);
KN_PLANTED(banks, 32 * 33 * 4, 1, 32);
KN_PLANTED(stack, 0);

}  // namespace
