// What mla_decode asks of its kernel for Hopper (mla_decode_sm90.cu), compiled for sm_90a alone:
// the schedule and the combination of splits are those of every device.
#pragma once
#include "cuda/mla_splits.cuh"

namespace kn::cuda {

constexpr int kSm90Heads = 64;   // of a block
constexpr int kSm90Tokens = 64;  // of a tile

// More heads than the other kernel reads the cache once for, pages of a multiple of 64 tokens, and
// rows that TMA can count.
inline bool suits_mla_sm90(const MlaProblem& p) {
  constexpr int64_t kRows = 1ll << 31;
  return p.heads > kSm90Heads / 2 && p.page_size % kSm90Tokens == 0 && p.pages > 0 &&
         p.pages * p.page_size < kRows && p.batch * p.heads < kRows;
}

// The results of all splits of the schedule, at most `splits`; returns how many workers share them.
// `p` must suit.
int mla_decode_sm90(const char* op, const MlaProblem& p, bool fp8, int64_t splits, void* stream);

}  // namespace kn::cuda
