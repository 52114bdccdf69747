// Bank conflicts, for the accesses that the wrappers see. Shared memory has 32 banks of 4 bytes; a
// pass serves one word of each. Accesses of 4 bytes or fewer are made by the whole warp at once, of
// 8 bytes by half of it, of 16 bytes by a quarter.
#include <algorithm>
#include <map>
#include <set>

#include "simt/thread.h"

namespace kn::simt {
namespace {

constexpr uint32_t kBanks = 32, kBankBytes = 4;

// Passes for lanes that are served together: the most distinct words that fall into one bank.
uint64_t passes(const SharedAccess* lanes, size_t n) {
  std::set<uint32_t> words;
  for (size_t i = 0; i < n; ++i)
    for (uint32_t b = 0; b < lanes[i].bytes; b += kBankBytes)
      words.insert((lanes[i].offset + b) / kBankBytes);
  uint64_t per_bank[kBanks] = {}, most = 0;
  for (const uint32_t w : words) most = std::max(most, ++per_bank[w % kBanks]);
  return most;
}

// A warp whose lanes read one word each, in order: the usual case, by far.
bool in_order(const std::vector<SharedAccess>& lanes) {
  for (size_t i = 1; i < lanes.size(); ++i)
    if (lanes[i].offset != lanes[0].offset + i * kBankBytes) return false;
  return lanes[0].bytes == kBankBytes;
}

}  // namespace

uint64_t wavefronts(const std::vector<SharedAccess>& lanes, uint64_t* ideal) {
  *ideal += 1;
  if (in_order(lanes)) return 1;
  const size_t together = lanes[0].bytes <= 4 ? 32 : lanes[0].bytes == 8 ? 16 : 8;
  uint64_t total = 0;
  for (size_t i = 0; i < lanes.size(); i += together)
    total += passes(&lanes[i], std::min(together, lanes.size() - i));
  *ideal += (lanes.size() - 1) / together;
  return total;
}

// The k-th accesses of the lanes are one instruction if they come from one place in the code.
void count_banks(Block& block, int warp) {
  Thread* lanes = &block.threads[size_t(warp) * 32];
  size_t most = 0;
  for (int l = 0; l < 32; ++l) most = std::max(most, lanes[l].accesses.size());
  if (most == 0) return;
  uint64_t passes = 0, ideal = 0;
  std::vector<SharedAccess> group;
  for (size_t k = 0; k < most; ++k) {
    uint32_t left = 0;
    for (int l = 0; l < 32; ++l)
      if (k < lanes[l].accesses.size()) left |= 1u << l;
    while (left) {
      const SharedAccess first = lanes[__builtin_ctz(left)].accesses[k];
      group.clear();
      for (int l = 0; l < 32; ++l) {
        if (!(left >> l & 1)) continue;
        const SharedAccess& a = lanes[l].accesses[k];
        if (a.site != first.site || a.bytes != first.bytes) continue;
        group.push_back(a);
        left &= ~(1u << l);
      }
      passes += wavefronts(group, &ideal);
    }
  }
  for (int l = 0; l < 32; ++l) lanes[l].accesses.clear();
  worker->count_shared(passes, ideal);
}

}  // namespace kn::simt
