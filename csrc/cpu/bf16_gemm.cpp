// Splits y = x Wt over (head x block of weight rows x block of tokens). Neighbouring tasks share
// weight rows, so that several blocks of tokens read them from memory once. No split changes the
// order of any sum.
#include <algorithm>

#include "core/error.h"
#include "core/threads.h"
#include "cpu/dispatch.h"
#include "kimi_native/ops.h"
#include "kimi_native/runtime.h"

namespace kn::cpu {
namespace {

constexpr const char* kOp = "bf16_gemm";
constexpr int64_t kPackedBytes = 512 << 10;  // tokens of a task as fp32: half of a 1 MB L2
constexpr int64_t kWeightBytes = 2 << 20;    // weights of a task: packing its tokens costs < 2 %
constexpr int64_t kTasksPerThread = 8;       // a core that loses time takes fewer of them
constexpr int64_t kRowStep = 16;             // rows of one store

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t mul(int64_t a, int64_t b) { return checked_mul(kOp, a, b); }

struct Plan {
  int64_t tokens_per_task, rows_per_task;
  int64_t token_blocks, row_blocks;
  int64_t thread_floats;  // packed tokens and one strip of sums
};

// Checks every size relation and decides the split.
Plan plan(const Bf16GemmArgs& a, const Kernels& k) {
  KN_REQUIRE(a.tokens >= 0 && a.heads >= 1 && a.out >= 1 && a.in >= 1,
             "bf16_gemm: need tokens >= 0 and heads, out, in >= 1 (got tokens=", a.tokens,
             ", heads=", a.heads, ", out=", a.out, ", in=", a.in, ")");
  KN_REQUIRE(a.x_token_stride >= 0 && a.x_head_stride >= 0 && a.weight_head_stride >= 0 &&
                 a.y_token_stride >= 0 && a.y_head_stride >= 0,
             "bf16_gemm: strides must not be negative (got x_token_stride=", a.x_token_stride,
             ", x_head_stride=", a.x_head_stride, ", weight_head_stride=", a.weight_head_stride,
             ", y_token_stride=", a.y_token_stride, ", y_head_stride=", a.y_head_stride, ")");
  // Each size stays 64 times below the limit, so sums and paddings of sizes fit too.
  mul(mul(std::max<int64_t>(a.tokens, 1), a.x_token_stride), 256);
  mul(mul(a.heads, a.x_head_stride), 256);
  mul(mul(a.heads, a.weight_head_stride), 128);
  mul(mul(a.out, a.in), 128);
  mul(mul(mul(a.tokens, a.heads), a.out), 256);
  mul(mul(std::max<int64_t>(a.tokens, 1), a.y_token_stride), 256);
  mul(mul(a.heads, a.y_head_stride), 256);
  const int64_t width = round_up(a.in, 16);
  const int64_t tile = k.dot_vectors;
  const int64_t fit = std::max(tile, kPackedBytes / (width * 4) / tile * tile);
  const int64_t tokens = std::max<int64_t>(a.tokens, 1);
  Plan p;
  // Blocks of nearly equal size, in whole register tiles.
  p.tokens_per_task = std::min(tokens, round_up(ceil_div(tokens, ceil_div(tokens, fit)), tile));
  p.token_blocks = ceil_div(tokens, p.tokens_per_task);
  const int64_t wanted_blocks =
      ceil_div(kTasksPerThread * num_threads(), mul(a.heads, p.token_blocks));
  const int64_t rows = std::min(kWeightBytes / (2 * a.in), ceil_div(a.out, wanted_blocks));
  p.rows_per_task = std::max(kRowStep, round_up(rows, kRowStep));
  p.row_blocks = ceil_div(a.out, p.rows_per_task);
  p.thread_floats = p.tokens_per_task * (width + 16);
  return p;
}

int64_t workspace_bytes(const Plan& p) { return mul(num_threads(), p.thread_floats * 4); }

}  // namespace

int64_t bf16_gemm_workspace_bytes(const Bf16GemmArgs& a) {
  return workspace_bytes(plan(a, kernels()));
}

void bf16_gemm(const Bf16GemmArgs& a) {
  const Kernels& k = kernels();
  const Plan p = plan(a, k);
  if (a.tokens == 0) return;
  KN_REQUIRE(a.x && a.weight && a.y, "bf16_gemm: x, weight and y must not be null (got x=", a.x,
             ", weight=", a.weight, ", y=", a.y, ")");
  KN_REQUIRE(
      a.workspace && uintptr_t(a.workspace) % 64 == 0 && a.workspace_bytes >= workspace_bytes(p),
      "bf16_gemm: workspace must be 64-byte aligned and hold ", workspace_bytes(p), " bytes (got ",
      a.workspace_bytes, " at ", a.workspace, ")");
  parallel_for(a.heads * p.row_blocks * p.token_blocks, [&](int64_t task, int thread) {
    const int64_t token = task % p.token_blocks * p.tokens_per_task;
    const int64_t row = task / p.token_blocks % p.row_blocks * p.rows_per_task;
    const int64_t head = task / p.token_blocks / p.row_blocks;
    const bf16* weight = a.weight + head * a.weight_head_stride;
    float* scratch = (float*)a.workspace + thread * p.thread_floats;
    Bf16GemmTile tile;
    tile.x = (const char*)a.x +
             (token * a.x_token_stride + head * a.x_head_stride) * dtype_bytes(a.x_dtype);
    tile.x_token_stride = a.x_token_stride;
    tile.weight = weight + row * a.in;
    tile.weight_end = weight + a.out * a.in;
    tile.y = (char*)a.y +
             (token * a.y_token_stride + head * a.y_head_stride + row) * dtype_bytes(a.y_dtype);
    tile.y_token_stride = a.y_token_stride;
    tile.x_dtype = a.x_dtype;
    tile.y_dtype = a.y_dtype;
    tile.tokens = std::min(p.tokens_per_task, a.tokens - token);
    tile.rows = std::min(p.rows_per_task, a.out - row);
    tile.in = a.in;
    tile.packed = scratch;
    tile.sums = scratch + p.tokens_per_task * round_up(a.in, 16);
    k.bf16_gemm_tile(tile);
  });
}

}  // namespace kn::cpu
