#include <sstream>

#include "simt/launch.h"

namespace kn::simt {
namespace {

std::string triple(uint3 v) {
  std::ostringstream s;
  s << "(" << v.x << ", " << v.y << ", " << v.z << ")";
  return s.str();
}

// "0-31, 40": sorted numbers as ranges.
std::string ranges(const std::vector<int>& numbers) {
  std::ostringstream s;
  for (size_t i = 0; i < numbers.size();) {
    size_t end = i;
    while (end + 1 < numbers.size() && numbers[end + 1] == numbers[end] + 1) ++end;
    s << (i ? ", " : "") << numbers[i];
    if (end > i) s << "-" << numbers[end];
    i = end + 1;
  }
  return s.str();
}

std::string describe(const Block& block, const Wait& wait) {
  std::ostringstream s;
  s << "at " << wait.what;
  if (wait.kind == Wait::Kind::kBarrier) {
    const Barrier& b = block.barriers[wait.id];
    s << " (barrier " << wait.id << ": " << b.arrived << " of "
      << (b.expected == kAll ? block.live : b.expected) << " arrived)";
  } else if (wait.kind == Wait::Kind::kWarp) {
    s << " (lane mask 0x" << std::hex << wait.id << ")";
  } else if (wait.kind == Wait::Kind::kMbarrier) {
    const Mbarrier& m = block.mbarriers.at(wait.id);
    s << " (mbarrier at byte " << wait.id << ": parity " << m.parity << ", " << m.pending << " of "
      << m.count << " arrivals and " << m.bytes << " bytes missing)";
  }
  return s.str();
}

}  // namespace

std::string place(const Launch& launch, const Thread& t) {
  return std::string("kernel ") + launch.grid.kernel + ", block " + triple(t.block->index) +
         ", thread " + triple(t.index);
}

std::string describe_deadlock(const Launch& launch, const std::vector<Block*>& blocks) {
  std::ostringstream s;
  s << "kernel " << launch.grid.kernel << ": deadlock";
  for (const Block* block : blocks) {
    std::map<std::string, std::vector<int>> groups;
    for (const Thread& t : block->threads)
      groups[t.done ? "have ended" : "wait " + describe(*block, t.wait)].push_back(t.id);
    s << "; block " << triple(block->index);
    for (const auto& [what, threads] : groups) s << "; threads " << ranges(threads) << " " << what;
  }
  if (const uint64_t started = launch.next_block; started < launch.order.size())
    s << "; " << launch.order.size() - started << " blocks have not started (resident are "
      << launch.settings.resident << " for each of " << launch.settings.os_threads
      << " OS threads)";
  return s.str();
}

}  // namespace kn::simt
