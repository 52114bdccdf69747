// Stable counting sort of the (token, slot) pairs by expert: count, scan, place. The offsets array
// is its own scratch: while placing, expert_offsets[e + 1] is the next free row of expert e, and
// when all are placed it is that expert's end. One thread: 4096 tokens of 8 slots take less time
// than the matrices of one of them.
#include "core/op_checks.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

void moe_dispatch(const MoeDispatchArgs& a) {
  const char* op = "moe_dispatch";
  const int64_t rows = check_op(a);
  for (int64_t i = 0; i < rows; ++i)
    KN_REQUIRE(a.topk_ids[i] >= 0 && a.topk_ids[i] < a.experts, op, ": topk_ids must be in [0, ",
               a.experts, ") (got ", a.topk_ids[i], " for token ", i / a.topk, ", slot ",
               i % a.topk, ")");

  int32_t* end = a.expert_offsets + 1;
  for (int64_t e = -1; e < a.experts; ++e) end[e] = 0;
  for (int64_t i = 0; i < rows; ++i) ++end[a.topk_ids[i]];
  int32_t begin = 0;
  for (int64_t e = 0; e < a.experts; ++e) {
    const int32_t count = end[e];
    end[e] = begin;
    begin += count;
  }
  for (int64_t t = 0; t < a.tokens; ++t) {
    for (int64_t slot = 0; slot < a.topk; ++slot) {
      const int32_t row = end[a.topk_ids[t * a.topk + slot]]++;
      a.token_index[row] = int32_t(t);
      a.row_index[t * a.topk + slot] = row;
    }
  }
}

}  // namespace kn::cpu
