// Splits y = x Wt. All tokens are packed first, in groups of at most a register tile; then tasks
// of (head x block of weight rows x block of groups) follow each other so that neighbours share
// weight rows, and several blocks of tokens read them from memory once. Many tokens are worked off
// in passes, so that their packed copy stays small. No split changes the order of any sum.
#include <algorithm>

#include "core/op_checks.h"
#include "core/threads.h"
#include "cpu/dispatch.h"
#include "kimi_native/ops.h"
#include "kimi_native/runtime.h"

namespace kn::cpu {
namespace {

constexpr const char* kOp = "bf16_gemm";
constexpr int64_t kPassBytes = 16 << 20;  // packed tokens of a pass, all heads
constexpr int64_t kTasksPerThread = 8;    // a core that loses time takes fewer of them
constexpr int64_t kRowStep = 32;          // rows that a tile takes at once
constexpr int64_t kPackAlone = 64 << 10;  // entries packed faster than a thread wakes

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t mul(int64_t a, int64_t b) { return checked_mul(kOp, a, b); }

struct Plan {
  int64_t group;                          // tokens packed side by side
  int64_t group_bytes;                    // of one of them, packed
  int64_t tokens_per_pass, groups;        // of a pass
  int64_t groups_per_task, group_blocks;  // the split of a pass
  int64_t rows_per_task, row_blocks;
  int64_t packed_bytes, scratch_bytes;  // of the workspace; scratch per thread
};

Plan plan(const Bf16GemmArgs& a, const Bf16GemmKernels& k) {
  check_op(a);
  const int64_t tokens = std::max<int64_t>(a.tokens, 1);
  Plan p;
  // Groups, passes and blocks of nearly equal size.
  p.group = k.group(tokens, a.in, a.x_dtype);
  p.group_bytes = round_up(k.packed_bytes(p.group, a.in, a.x_dtype), 64);
  const int64_t all = ceil_div(tokens, p.group);
  const int64_t fit = std::clamp<int64_t>(kPassBytes / mul(a.heads, p.group_bytes), 1, all);
  p.groups = ceil_div(all, ceil_div(all, fit));
  p.tokens_per_pass = p.groups * p.group;
  const int64_t shared =
      std::clamp<int64_t>(std::min(k.task_bytes / p.group_bytes, k.task_groups), 1, p.groups);
  p.groups_per_task = ceil_div(p.groups, ceil_div(p.groups, shared));
  p.group_blocks = ceil_div(p.groups, p.groups_per_task);
  const int64_t wanted_blocks =
      ceil_div(kTasksPerThread * num_threads(), mul(a.heads, p.group_blocks));
  const int64_t rows = std::min(k.task_weight_bytes / (2 * a.in), ceil_div(a.out, wanted_blocks));
  p.rows_per_task = std::max(kRowStep, round_up(rows, kRowStep));
  p.row_blocks = ceil_div(a.out, p.rows_per_task);
  p.packed_bytes = mul(mul(a.heads, p.groups), p.group_bytes);
  p.scratch_bytes = round_up(k.scratch_bytes(p.rows_per_task, a.in, p.groups_per_task), 64);
  return p;
}

int64_t workspace_bytes(const Plan& p) { return p.packed_bytes + num_threads() * p.scratch_bytes; }

// Packs tokens `first` .. of all heads: [head][group].
void pack_pass(const Bf16GemmArgs& a, const Bf16GemmKernels& k, const Plan& p, int64_t first,
               int64_t tokens) {
  const int64_t groups = ceil_div(tokens, p.group);
  const auto pack = [&](int64_t task) {
    const int64_t head = task / groups, token = task % groups * p.group;
    const int64_t at = (first + token) * a.x_token_stride + head * a.x_head_stride;
    k.pack({.x = (const char*)a.x + at * dtype_bytes(a.x_dtype),
            .x_token_stride = a.x_token_stride,
            .x_dtype = a.x_dtype,
            .tokens = std::min(p.group, tokens - token),
            .group = p.group,
            .in = a.in,
            .packed = (char*)a.workspace + (head * p.groups + task % groups) * p.group_bytes});
  };
  const int64_t tasks = a.heads * groups;
  if (tokens * a.heads * a.in > kPackAlone)
    parallel_for(tasks, [&](int64_t task, int) { pack(task); });
  else
    for (int64_t task = 0; task < tasks; ++task) pack(task);
}

void multiply_pass(const Bf16GemmArgs& a, const Bf16GemmKernels& k, const Plan& p, int64_t first,
                   int64_t tokens) {
  const int64_t block = p.groups_per_task * p.group, blocks = ceil_div(tokens, block);
  parallel_for(a.heads * p.row_blocks * blocks, [&](int64_t task, int thread) {
    const int64_t token = task % blocks * block;
    const int64_t row = task / blocks % p.row_blocks * p.rows_per_task;
    const int64_t head = task / blocks / p.row_blocks;
    const int64_t at = (first + token) * a.y_token_stride + head * a.y_head_stride + row;
    const bf16* weight = a.weight + head * a.weight_head_stride;
    const bf16* next = row + p.rows_per_task < a.out ? weight + (row + p.rows_per_task) * a.in
                       : head + 1 < a.heads          ? weight + a.weight_head_stride
                                                     : nullptr;
    char* scratch = (char*)a.workspace + p.packed_bytes + thread * p.scratch_bytes;
    k.tile(
        {.packed = (const char*)a.workspace + (head * p.groups + token / p.group) * p.group_bytes,
         .weight = weight + row * a.in,
         .weight_end = weight + a.out * a.in,
         .next = next,
         .y = (char*)a.y + at * dtype_bytes(a.y_dtype),
         .y_token_stride = a.y_token_stride,
         .x_dtype = a.x_dtype,
         .y_dtype = a.y_dtype,
         .tokens = std::min(block, tokens - token),
         .group = p.group,
         .group_bytes = p.group_bytes,
         .rows = std::min(p.rows_per_task, a.out - row),
         .in = a.in,
         .scratch = (float*)scratch});
  });
}

}  // namespace

int64_t bf16_gemm_workspace_bytes(const Bf16GemmArgs& a) {
  return workspace_bytes(plan(a, kernels().bf16_gemm));
}

void bf16_gemm(const Bf16GemmArgs& a) {
  const Bf16GemmKernels& k = kernels().bf16_gemm;
  const Plan p = plan(a, k);
  if (a.tokens == 0) return;
  KN_REQUIRE(a.x && a.weight && a.y, "bf16_gemm: x, weight and y must not be null (got x=", a.x,
             ", weight=", a.weight, ", y=", a.y, ")");
  KN_REQUIRE(
      a.workspace && uintptr_t(a.workspace) % 64 == 0 && a.workspace_bytes >= workspace_bytes(p),
      "bf16_gemm: workspace must be 64-byte aligned and hold ", workspace_bytes(p), " bytes (got ",
      a.workspace_bytes, " at ", a.workspace, ")");
  for (int64_t first = 0; first < a.tokens; first += p.tokens_per_pass) {
    const int64_t tokens = std::min(p.tokens_per_pass, a.tokens - first);
    pack_pass(a, k, p, first, tokens);
    multiply_pass(a, k, p, first, tokens);
  }
}

}  // namespace kn::cpu
