// mla_schedule: the list of splits of up to 512 tokens, made on the device, where the lengths are:
// the host never learns one. One block. Bytes: 4 a sequence in, 8 a split out.
#include "cuda/elements.h"
#include "cuda/mla_schedule.cuh"
#include "cuda/reduce.cuh"

namespace kn::cuda {
namespace {

constexpr const char* kOp = "mla_schedule";
constexpr int kScheduleThreads = 256;

__global__ void __launch_bounds__(kScheduleThreads)
    mla_schedule_kernel(const int32_t* seq_lens, int64_t batch, int64_t most_tokens,
                        int64_t capacity, Schedule schedule) {
  KN_SHARED(shared);
  const int64_t each = (batch + kScheduleThreads - 1) / kScheduleThreads;
  const int64_t begin = min(int64_t(threadIdx.x) * each, batch), end = min(begin + each, batch);
  int64_t mine = 0;
  for (int64_t b = begin; b < end; ++b) {
    const int32_t length = seq_lens[b];
    device_require(length >= 0 && length <= most_tokens,
                   "mla_schedule: seq_lens must be 0 to max_pages * page_size");
    mine += (length + kSplitTokens - 1) / kSplitTokens;
  }
  device_require(mine <= capacity, "mla_schedule: all splits must be at most max_splits");
  const auto partial = shared_at<int32_t>(shared, 0);
  int32_t next = exclusive_scan(int32_t(mine), partial);
  int64_t all = 0;
  for (int w = 0; w < kScheduleThreads / 32; ++w) all += partial[w];
  device_require(all <= capacity, "mla_schedule: all splits must be at most max_splits");
  if (threadIdx.x == 0) schedule.first[batch] = int32_t(all);
  for (int64_t b = begin; b < end; ++b) {
    schedule.first[b] = next;
    for (int32_t token = 0; token < seq_lens[b]; token += kSplitTokens)
      schedule.splits[next++] = make_int2(int(b), token);
  }
}

int64_t checked_capacity(const MlaScheduleArgs& a) {
  KN_REQUIRE(a.batch >= 0 && a.max_tokens >= 0, kOp,
             ": need batch, max_tokens >= 0 (got batch=", a.batch, ", max_tokens=", a.max_tokens,
             ")");
  return split_capacity(kOp, a.batch, a.max_tokens, a.max_splits);
}

}  // namespace

int64_t mla_schedule_workspace_bytes(const MlaScheduleArgs& a) {
  return schedule_bytes(kOp, a.batch, checked_capacity(a));
}

void mla_schedule(const MlaScheduleArgs& a, void* stream) {
  const int64_t needed = mla_schedule_workspace_bytes(a);
  if (a.batch == 0) return;
  KN_REQUIRE(a.workspace && uintptr_t(a.workspace) % 16 == 0 && a.workspace_bytes >= needed, kOp,
             ": workspace must have ", needed, " bytes, 16-byte aligned (got ", a.workspace_bytes,
             " at ", a.workspace, ")");
  KN_REQUIRE(a.seq_lens, kOp, ": seq_lens must not be null (got null)");
  check_elements(kOp, {{a.seq_lens, 4}});
  launch({kOp, dim3(1), dim3(kScheduleThreads), kScheduleThreads / 32 * 4, stream},
         mla_schedule_kernel, a.seq_lens, a.batch, a.max_tokens, checked_capacity(a),
         schedule_at(a.workspace, a.batch));
}

}  // namespace kn::cuda
