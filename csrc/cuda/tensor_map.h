// A two-dimensional tensor in global memory as the TMA unit sees it, made on the host and passed to
// kernels by value (`const __grid_constant__ TensorMap`).
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda.h>
#endif

namespace kn::cuda {

// How a box lies in shared memory: rows of at most so many bytes, whose 16-byte pieces are permuted
// so that a column of them falls into different banks: address bits 4.. ^= bits 7.. (2, 1 or 3 of
// them).
enum class Swizzle : int32_t { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };

struct TensorMap {
#if defined(__CUDACC__)
  CUtensorMap map;
#else
  const char* base;
  int64_t columns, rows, row_bytes;
  int element_bytes, box_columns, box_rows;
  Swizzle swizzle;
#endif
};

struct TensorMapConfig {
  const void* base;           // 16-byte aligned
  int element_bytes;          // 1 or 2
  int64_t columns, rows;      // of the tensor; boxes reach over its edge and get zeros there
  int64_t row_bytes;          // from row to row, a multiple of 16
  int box_columns, box_rows;  // at most 256 each; a row of the box at most the swizzle's bytes
  Swizzle swizzle;
};

// Throws std::invalid_argument("op: ...") on a rule broken, std::runtime_error without a driver.
TensorMap make_tensor_map(const char* op, const TensorMapConfig& config);

}  // namespace kn::cuda
