// One kernel per wrapper of cuda/ptx_sm90.cuh, run on the same bits by a GPU and by the shim.
#include "cuda/ptx_sm90.cuh"
#include "programs.h"

namespace {

using namespace kn;        // NOLINT: a test program
using namespace kn::cuda;  // NOLINT

// ---- bulk copies through mbarriers: a producer warp, a consumer warp, a ring of two -------------
// ----------------

constexpr int kPiece = 256;  // bytes
constexpr int kStages = 2;

template <bool kOnce>
__global__ void bulk_copy_kernel(const char* in, int32_t* out, int pieces) {
  KN_SHARED(shared);
  const auto full = shared_at<uint64_t>(shared, kStages * kPiece);
  const auto empty = full + kStages;
  const int lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, 32);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    for (int p = 0; p < pieces && lane == 0; ++p) {
      const int s = p % kStages;
      if (p >= kStages) ptx::mbarrier_wait(empty + s, (p / kStages - 1) & 1);
      ptx::mbarrier_arrive_expect(full + s, kPiece);
      if constexpr (kOnce)
        ptx::bulk_copy_once(shared_at<char>(shared, s * kPiece), in + p * kPiece, kPiece, full + s);
      else
        ptx::bulk_copy(shared_at<char>(shared, s * kPiece), in + p * kPiece, kPiece, full + s);
    }
  } else {
    const auto words = shared_at<int32_t>(shared, 0);
    for (int p = 0; p < pieces; ++p) {
      const int s = p % kStages;
      ptx::mbarrier_wait(full + s, p / kStages & 1);
      for (int i = lane; i < kPiece / 4; i += 32)
        out[p * kPiece / 4 + i] = words[s * kPiece / 4 + i] + p;
      ptx::mbarrier_arrive(empty + s);
    }
  }
}

template <bool kOnce>
void bulk_copy(const Buffers& b) {
  launch({"bulk_copy", dim3(1), dim3(64), kStages * (kPiece + 16), b.stream},
         bulk_copy_kernel<kOnce>, static_cast<const char*>(b.in), static_cast<int32_t*>(b.out),
         int(b.in_bytes / kPiece));
}

// ---- TMA: one box, its bytes as they lie in shared memory ---------------------------------------

struct BoxArgs {
  TensorMap map;
  uint32_t* out;
  int column, row, bytes;
};

template <bool kOnce>
__global__ void tma_load_2d_kernel(const __grid_constant__ BoxArgs a) {
  KN_SHARED(shared);
  const auto barrier = shared_at<uint64_t>(shared, a.bytes);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect(barrier, a.bytes);
    if constexpr (kOnce)
      ptx::tma_load_2d_once(shared_at<char>(shared, 0), &a.map, a.column, a.row, barrier);
    else
      ptx::tma_load_2d(shared_at<char>(shared, 0), &a.map, a.column, a.row, barrier);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  const auto words = shared_at<uint32_t>(shared, 0);
  for (int i = int(threadIdx.x); i < a.bytes / 4; i += int(blockDim.x)) a.out[i] = words[i];
}

// in: a tensor of 40 rows and 72 columns of two bytes, rows 176 bytes apart. The box has 16 rows.
// variant: column + 20 + 100 (row + 20) + 10000 swizzle
template <bool kOnce>
void tma_load_2d(const Buffers& b) {
  const int column = b.variant % 100, row = b.variant / 100 % 100, swizzle = b.variant / 10000;
  const int box_columns = swizzle == 0 ? 64 : swizzle / 2;
  BoxArgs a;
  a.map = make_tensor_map("tma_load_2d", {b.in, 2, 72, 40, 176, box_columns, 16, Swizzle(swizzle)});
  a.out = static_cast<uint32_t*>(b.out);
  a.column = column - 20;
  a.row = row - 20;
  a.bytes = box_columns * 16 * 2;
  launch({"tma_load_2d", dim3(1), dim3(64), size_t(a.bytes) + 8, b.stream},
         tma_load_2d_kernel<kOnce>, a);
}

// ---- wgmma: 64 x n x 64, operands in shared memory, a also from registers, b also n-major -------

template <Swizzle kSwizzle>
struct Tile {
  static constexpr int kWidth = kSwizzle == Swizzle::kNone ? 16 : int(kSwizzle);  // bytes of a row

  // Offset of 16 bytes: columns 8c .. 8c + 7 of `row`, in a matrix of `rows` rows.
  __device__ static int offset(int rows, int row, int c) {
    const int per = kWidth / 16;
    const int atom = (c / per * rows + row) * kWidth;
    const int piece = kSwizzle == Swizzle::kNone ? 0 : (c % per) ^ (atom >> 7 & (per - 1));
    return atom + piece * 16;
  }
  // The descriptor of columns 16k .. 16k + 15.
  __device__ static uint64_t descriptor(SharedPtr<char> start, int rows, int k) {
    const int leading = rows * 16;  // without swizzle: the next eight columns
    const int at = kSwizzle == Swizzle::kNone ? 2 * k * leading
                                              : k * 32 / kWidth * rows * kWidth + k * 32 % kWidth;
    return ptx::matrix_descriptor(start + at, kSwizzle, leading, 8 * kWidth);
  }
};

constexpr int kM = 64, kK = 64;

template <Swizzle kSwizzle>
__device__ void store_tile(SharedPtr<char> to, const uint4* from, int rows) {
  for (int i = int(threadIdx.x); i < rows * kK / 8; i += int(blockDim.x)) {
    const int row = i / (kK / 8), c = i % (kK / 8);
    *shared_cast<uint4>(to + Tile<kSwizzle>::offset(rows, row, c)) = from[i];
  }
}

// b^T, a matrix of 64 rows (k) and n columns, for a product that takes it n-major.
template <Swizzle kSwizzle>
struct TileN {
  static constexpr int kWidth = Tile<kSwizzle>::kWidth;
  static constexpr int kAtom = 8 * kWidth;         // eight rows, one behind the other
  static constexpr int kLeading = kK / 8 * kAtom;  // to the next kWidth bytes of a row

  __device__ static void store(SharedPtr<char> to, const char* b, int n) {
    for (int i = int(threadIdx.x); i < n * kK; i += int(blockDim.x)) {
      const int k = i / n, column = i % n;
      const int at = column * 2 / kWidth * kLeading + k * kWidth + column * 2 % kWidth;
      const int swizzled =
          kSwizzle == Swizzle::kNone ? at : at ^ (at >> 7 & (kWidth / 16 - 1)) << 4;
      *shared_cast<uint16_t>(to + swizzled) = reinterpret_cast<const uint16_t*>(b)[column * kK + k];
    }
  }
  // The descriptor of rows 16k .. 16k + 15.
  __device__ static uint64_t descriptor(SharedPtr<char> start, int k) {
    const auto at = start + 2 * k * kAtom;
    if constexpr (kSwizzle == Swizzle::kNone)
      return ptx::matrix_descriptor(at, kSwizzle, kAtom, kLeading);
    return ptx::matrix_descriptor(at, kSwizzle, kLeading, kAtom);
  }
};

// in: a [64, 64] bf16, b [n, 64] bf16, d [64, n] fp32; out: d + a * b^T
template <int kN, Swizzle kSwizzle, bool kRegisters, ptx::Major kB>
__global__ void wgmma_kernel(const char* in, float* out) {
  KN_SHARED(shared);
  const auto a = shared_at<char>(shared, 0), b = shared_at<char>(shared, kM * kK * 2);
  const auto* a_in = reinterpret_cast<const uint4*>(in);
  const auto* d_in = reinterpret_cast<const float*>(in + (kM + kN) * kK * 2);
  store_tile<kSwizzle>(a, a_in, kM);
  if constexpr (kB == ptx::Major::kK)
    store_tile<kSwizzle>(b, a_in + kM * kK / 8, kN);
  else
    TileN<kSwizzle>::store(b, in + kM * kK * 2, kN);
  ptx::fence_proxy_async();
  __syncthreads();
  const int warp = int(threadIdx.x) / 32, g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  float d[kN / 2];
  for (int i = 0; i < kN / 2; ++i)
    d[i] = d_in[(warp * 16 + g + i / 2 % 2 * 8) * kN + i / 4 * 8 + 2 * t + i % 2];
  uint32_t fragment[kK / 16][4];
  for (int k = 0; k < kK / 16; ++k)
    for (int r = 0; r < 4; ++r)
      fragment[k][r] = reinterpret_cast<const uint32_t*>(
          in)[(warp * 16 + g + r % 2 * 8) * kK / 2 + k * 8 + r / 2 * 4 + t];
  ptx::wgmma_fence();
  for (int k = 0; k < kK / 16; ++k) {
    const uint64_t db = kB == ptx::Major::kK ? Tile<kSwizzle>::descriptor(b, kN, k)
                                             : TileN<kSwizzle>::descriptor(b, k);
    if constexpr (kRegisters)
      ptx::wgmma_m64k16_bf16<kN, kB>(d, fragment[k], db, true);
    else
      ptx::wgmma_m64k16_bf16<kN, kB>(d, Tile<kSwizzle>::descriptor(a, kM, k), db, true);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_settle(d);
  for (int i = 0; i < kN / 2; ++i)
    out[(warp * 16 + g + i / 2 % 2 * 8) * kN + i / 4 * 8 + 2 * t + i % 2] = d[i];
}

template <int kN, Swizzle kSwizzle, bool kRegisters, ptx::Major kB>
void run_wgmma(const Buffers& b) {
  launch({"wgmma", dim3(1), dim3(128), (kM + kN) * kK * 2, b.stream},
         wgmma_kernel<kN, kSwizzle, kRegisters, kB>, static_cast<const char*>(b.in),
         static_cast<float*>(b.out));
}

template <Swizzle kSwizzle, bool kRegisters, ptx::Major kB>
void choose_n(const Buffers& b) {
  const int n = b.variant / 10;
  if (n == 16) return run_wgmma<16, kSwizzle, kRegisters, kB>(b);
  if (n == 32) return run_wgmma<32, kSwizzle, kRegisters, kB>(b);
  if (n == 64) return run_wgmma<64, kSwizzle, kRegisters, kB>(b);
  if (n == 128) return run_wgmma<128, kSwizzle, kRegisters, kB>(b);
  if (n == 256) return run_wgmma<256, kSwizzle, kRegisters, kB>(b);
  throw std::invalid_argument("wgmma: no such variant");
}

// variant: 10 n + swizzle (0 none, 1 32 bytes, 2 64, 3 128)
template <bool kRegisters, ptx::Major kB>
void wgmma(const Buffers& b) {
  const int swizzle = b.variant % 10;
  if (swizzle == 0) return choose_n<Swizzle::kNone, kRegisters, kB>(b);
  if (swizzle == 1) return choose_n<Swizzle::k32, kRegisters, kB>(b);
  if (swizzle == 2) return choose_n<Swizzle::k64, kRegisters, kB>(b);
  return choose_n<Swizzle::k128, kRegisters, kB>(b);
}

KN_PROGRAM(bulk_copy, bulk_copy<false>);
KN_PROGRAM(bulk_copy_once, bulk_copy<true>);
KN_PROGRAM(tma_load_2d, tma_load_2d<false>);
KN_PROGRAM(tma_load_2d_once, tma_load_2d<true>);
KN_PROGRAM(wgmma_shared, wgmma<false, ptx::Major::kK>);
KN_PROGRAM(wgmma_registers, wgmma<true, ptx::Major::kK>);
KN_PROGRAM(wgmma_shared_n, wgmma<false, ptx::Major::kN>);
KN_PROGRAM(wgmma_registers_n, wgmma<true, ptx::Major::kN>);

}  // namespace
