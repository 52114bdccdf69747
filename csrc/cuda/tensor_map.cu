#include "core/error.h"
#include "cuda/device.cuh"
#include "cuda/tensor_map.h"

namespace kn::cuda {
namespace {

void check_config(const char* op, const TensorMapConfig& c) {
  KN_REQUIRE(c.base && reinterpret_cast<uintptr_t>(c.base) % 16 == 0, op,
             ": a tensor for TMA must be 16-byte aligned (got ", c.base, ")");
  KN_REQUIRE(c.element_bytes == 1 || c.element_bytes == 2, op,
             ": element_bytes must be 1 or 2 (got ", c.element_bytes, ")");
  KN_REQUIRE(c.columns >= 1 && c.rows >= 1 && c.columns < (1ll << 32) && c.rows < (1ll << 32), op,
             ": columns and rows must be 1 to 2^32 - 1 (got ", c.columns, ", ", c.rows, ")");
  KN_REQUIRE(c.row_bytes % 16 == 0 && c.row_bytes >= c.columns * c.element_bytes &&
                 c.row_bytes < (1ll << 40),
             op, ": row_bytes must be a multiple of 16 that holds a row (got ", c.row_bytes, ")");
  KN_REQUIRE(c.box_columns >= 1 && c.box_columns <= 256 && c.box_rows >= 1 && c.box_rows <= 256, op,
             ": a box must have 1 to 256 columns and rows (got ", c.box_columns, ", ", c.box_rows,
             ")");
  const int box_bytes = c.box_columns * c.element_bytes;
  KN_REQUIRE(box_bytes % 16 == 0, op, ": a row of a box must be a multiple of 16 bytes (got ",
             box_bytes, ")");
  KN_REQUIRE(c.swizzle == Swizzle::kNone || box_bytes <= int(c.swizzle), op,
             ": a row of a box must fit the swizzle (got ", box_bytes, " bytes, swizzle ",
             int(c.swizzle), ")");
}

#if defined(__CUDACC__)

// libcuda is asked for at run time, so that the library loads on a machine without a driver.
auto encode_function(const char* op) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(op, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                             cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || !function)
    throw std::runtime_error(concat(op, ": the driver has no cuTensorMapEncodeTiled"));
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

CUtensorMapSwizzle swizzle_code(Swizzle s) {
  switch (s) {
    case Swizzle::k32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case Swizzle::k64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::k128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

#endif

}  // namespace

TensorMap make_tensor_map(const char* op, const TensorMapConfig& c) {
  check_config(op, c);
#if defined(__CUDACC__)
  TensorMap result;
  const cuuint64_t size[2] = {cuuint64_t(c.columns), cuuint64_t(c.rows)};
  const cuuint64_t stride[1] = {cuuint64_t(c.row_bytes)};
  const cuuint32_t box[2] = {cuuint32_t(c.box_columns), cuuint32_t(c.box_rows)};
  const cuuint32_t step[2] = {1, 1};
  const CUresult status = encode_function(op)(
      &result.map,
      c.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
      const_cast<void*>(c.base), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle_code(c.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(concat(op, ": cuTensorMapEncodeTiled failed with ", int(status)));
  return result;
#else
  return {static_cast<const char*>(c.base),
          c.columns,
          c.rows,
          c.row_bytes,
          c.element_bytes,
          c.box_columns,
          c.box_rows,
          c.swizzle};
#endif
}

}  // namespace kn::cuda
