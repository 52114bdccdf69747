// One kernel per wrapper of cuda/ptx.cuh, run on the same bits by a GPU and by the shim. Inputs are
// read lane by lane from `in`, results written lane by lane to `out`.
#include "cuda/ptx.cuh"
#include "programs.h"

namespace {

using namespace kn;        // NOLINT: a test program
using namespace kn::cuda;  // NOLINT

// ---- matrix products: per lane 4 accumulators, 4 words of a, 2 words of b -----------------------

template <typename T, typename F>
__device__ void product(const uint32_t* in, T* out, F mma) {
  const int lane = int(threadIdx.x);
  T d[4];
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    d[i] = reinterpret_cast<const T*>(in)[lane * 10 + i];
    a[i] = in[lane * 10 + 4 + i];
  }
  for (int i = 0; i < 2; ++i) b[i] = in[lane * 10 + 8 + i];
  mma(d, a, b);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = d[i];
}

struct MmaBf16 {
  __device__ void operator()(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    ptx::mma_m16n8k16_bf16(d, a, b);
  }
};
struct MmaS8 {
  __device__ void operator()(int32_t (&d)[4], const uint32_t (&a)[4],
                             const uint32_t (&b)[2]) const {
    ptx::mma_m16n8k32_s8(d, a, b);
  }
};

template <typename T, typename F>
__global__ void product_kernel(const uint32_t* in, T* out) {
  product(in, out, F());
}

// ---- ldmatrix: four matrices of 8 rows of 16 bytes ----------------------------------------------

// variant: 0 x4, 1 x4 transposed, 2 x2, 3 x2 transposed
__global__ void ldmatrix_kernel(const uint4* in, uint32_t* out, int variant) {
  KN_SHARED(shared);
  const auto rows = shared_at<uint4>(shared, 0);
  const int lane = int(threadIdx.x);
  rows[lane] = in[lane];
  __syncwarp();
  uint32_t four[4] = {}, two[2] = {};
  if (variant == 0) ptx::ldmatrix_x4(four, rows + lane);
  if (variant == 1) ptx::ldmatrix_x4_trans(four, rows + lane);
  if (variant == 2) ptx::ldmatrix_x2(two, rows + lane % 16);
  if (variant == 3) ptx::ldmatrix_x2_trans(two, rows + lane % 16);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = variant < 2 ? four[i] : i < 2 ? two[i] : 0;
}

// ---- asynchronous copies: three groups, waited for one by one -----------------------------------

// Lane l copies piece 31 - l of each group; odd lanes of the last group copy nothing and get zeros.
template <int kBytes>
__global__ void cp_async_kernel(const char* in, uint32_t* out) {
  KN_SHARED(shared);
  const auto bytes = shared_at<char>(shared, 0);
  const auto words = shared_at<uint32_t>(shared, 0);
  const int lane = int(threadIdx.x);
  constexpr int kWords = kBytes / 4;
  for (int group = 0; group < 3; ++group) {
    const int to = (group * 32 + lane) * kBytes, from = (group * 32 + 31 - lane) * kBytes;
    const bool ok = group < 2 || lane % 2 == 0;
    if constexpr (kBytes == 16) ptx::cp_async_16(bytes + to, in + from, ok);
    if constexpr (kBytes == 8) ptx::cp_async_8(bytes + to, in + from, ok);
    if constexpr (kBytes == 4) ptx::cp_async_4(bytes + to, in + from, ok);
    ptx::cp_async_commit();
  }
  for (int group = 0; group < 3; ++group) {
    if (group == 0) ptx::cp_async_wait<2>();
    if (group == 1) ptx::cp_async_wait<1>();
    if (group == 2) ptx::cp_async_wait<0>();
    __syncwarp();
    const int neighbour = (lane + 1) % 32;
    for (int i = 0; i < kWords; ++i)
      out[(group * 32 + lane) * kWords + i] = words[(group * 32 + neighbour) * kWords + i];
  }
}

// ---- named barriers: warps 0 and 1 hand a value to warps 2 and 3 --------------------------------

__global__ void named_barrier_kernel(const int32_t* in, int32_t* out) {
  KN_SHARED(shared);
  const auto values = shared_at<int32_t>(shared, 0);
  const int i = int(threadIdx.x);
  if (i < 64) {
    values[i] = in[i] + 1;
    ptx::barrier_arrive(1, 128);
    ptx::barrier_sync(2, 64);  // the two producers alone
    out[i] = values[63 - i];
  } else {
    ptx::barrier_sync(1, 128);
    out[i] = values[i - 64] * 2;
  }
}

// ---- words: out[i] = f(in[3 i], in[3 i + 1], in[3 i + 2]) ---------------------------------------

enum class Word { kLop3, kPrmt, kFma, kToBf16x2, kToBf16, kExp2, kStreaming };

template <Word kWord>
__global__ void word_kernel(const uint32_t* in, uint32_t* out, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const uint32_t a = in[3 * i], b = in[3 * i + 1], c = in[3 * i + 2];
  if constexpr (kWord == Word::kLop3)
    out[i] = ptx::lop3<(0xf0 & 0xcc) | 0xaa>(a, b, c) ^ ptx::lop3<0x96>(c, a, b) * 3;
  if constexpr (kWord == Word::kPrmt) out[i] = ptx::prmt(a, b, c);
  if constexpr (kWord == Word::kFma) out[i] = ptx::fma_bf16x2(a, b, c);
  if constexpr (kWord == Word::kToBf16x2)
    out[i] = ptx::to_bf16x2(__uint_as_float(a), __uint_as_float(b));
  if constexpr (kWord == Word::kToBf16) out[i] = ptx::to_bf16(__uint_as_float(a));
  if constexpr (kWord == Word::kExp2)
    out[i] = __float_as_uint(ptx::exp2_approx(__uint_as_float(a)));
  if constexpr (kWord == Word::kStreaming) {
    const uint4 v = ptx::load_streaming(in + i % 8 * 4);
    out[i] = v.x ^ v.y * 3 ^ v.z * 5 ^ v.w * 7;
  }
}

// ---- shuffles and votes: nine results a lane ----------------------------------------------------

__global__ void shuffle_kernel(const uint32_t* in, uint32_t* out) {
  const int lane = int(threadIdx.x);
  const uint32_t v = in[lane];
  const unsigned all = 0xffffffffu;
  out[lane * 9 + 0] = __shfl_sync(all, v, int(v % 32));
  out[lane * 9 + 1] = __shfl_sync(all, v, lane * 3, 8);
  out[lane * 9 + 2] = __shfl_xor_sync(all, v, 5);
  out[lane * 9 + 3] = __shfl_up_sync(all, v, 3);
  out[lane * 9 + 4] = __shfl_down_sync(all, v, 3, 16);
  out[lane * 9 + 5] = __ballot_sync(all, v & 1);
  out[lane * 9 + 6] = uint32_t(__any_sync(all, v == 77)) * 2 + uint32_t(__all_sync(all, v < 200));
  out[lane * 9 + 7] = __match_any_sync(all, v % 5);
  out[lane * 9 + 8] = 0;
  if (lane >= 16)
    out[lane * 9 + 8] = __shfl_xor_sync(0xffff0000u, v, 3) + __ballot_sync(0xffff0000u, v & 2);
}

// ---- release and acquire between blocks ---------------------------------------------------------

__global__ void chain_of_blocks_kernel(const int32_t* in, int32_t* out) {
  if (threadIdx.x == 0) {
    const int b = int(blockIdx.x);
    spin_until([&] { return ptx::load_acquire(out) == b; });
    out[1] = out[1] * 3 + in[b];
    ptx::store_release(out, b + 1);
  }
}

template <typename In, typename Out, typename... Rest>
void run(const char* name, void (*kernel)(const In*, Out*, Rest...), const Buffers& b, int blocks,
         int threads, size_t shared, Rest... rest) {
  launch({name, dim3(unsigned(blocks)), dim3(unsigned(threads)), shared, b.stream}, kernel,
         static_cast<const In*>(b.in), static_cast<Out*>(b.out), rest...);
}

template <Word kWord>
void words(const char* name, const Buffers& b) {
  const int n = int(b.out_bytes / 4);
  run(name, word_kernel<kWord>, b, (n + 127) / 128, 128, 0, n);
}

KN_PROGRAM(mma_m16n8k16_bf16, [](const Buffers& b) {
  run("mma_m16n8k16_bf16", product_kernel<float, MmaBf16>, b, 1, 32, 0);
});
KN_PROGRAM(mma_m16n8k32_s8, [](const Buffers& b) {
  run("mma_m16n8k32_s8", product_kernel<int32_t, MmaS8>, b, 1, 32, 0);
});
KN_PROGRAM(ldmatrix, [](const Buffers& b) {
  run("ldmatrix", ldmatrix_kernel, b, 1, 32, 512, int(b.variant));
});
KN_PROGRAM(cp_async_16, [](const Buffers& b) {
  run("cp_async_16", cp_async_kernel<16>, b, 1, 32, 3 * 32 * 16);
});
KN_PROGRAM(cp_async_8,
           [](const Buffers& b) { run("cp_async_8", cp_async_kernel<8>, b, 1, 32, 3 * 32 * 8); });
KN_PROGRAM(cp_async_4,
           [](const Buffers& b) { run("cp_async_4", cp_async_kernel<4>, b, 1, 32, 3 * 32 * 4); });
KN_PROGRAM(named_barrier,
           [](const Buffers& b) { run("named_barrier", named_barrier_kernel, b, 1, 128, 256); });
KN_PROGRAM(lop3, [](const Buffers& b) { words<Word::kLop3>("lop3", b); });
KN_PROGRAM(prmt, [](const Buffers& b) { words<Word::kPrmt>("prmt", b); });
KN_PROGRAM(fma_bf16x2, [](const Buffers& b) { words<Word::kFma>("fma_bf16x2", b); });
KN_PROGRAM(to_bf16x2, [](const Buffers& b) { words<Word::kToBf16x2>("to_bf16x2", b); });
KN_PROGRAM(to_bf16, [](const Buffers& b) { words<Word::kToBf16>("to_bf16", b); });
KN_PROGRAM(exp2_approx, [](const Buffers& b) { words<Word::kExp2>("exp2_approx", b); });
KN_PROGRAM(load_streaming, [](const Buffers& b) { words<Word::kStreaming>("load_streaming", b); });
KN_PROGRAM(shuffle, [](const Buffers& b) { run("shuffle", shuffle_kernel, b, 1, 32, 0); });
KN_PROGRAM(chain_of_blocks,
           [](const Buffers& b) { run("chain_of_blocks", chain_of_blocks_kernel, b, 4, 32, 0); });

}  // namespace
