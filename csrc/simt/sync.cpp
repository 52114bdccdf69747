// Barriers and warp meetings, and what they order.
#include "simt/thread.h"
#include "simt/warp.h"

namespace kn::simt {

void release(Clock& to) {
  Block& b = *self->block;
  to.join(self->clock, b.phase);
  to.set(size_t(self->id), self->now++, b.phase, b.clock_width());
}

void acquire(const Clock& from) { self->clock.join(from, self->block->phase); }

namespace {

unsigned expected_now(const Barrier& b) {
  return b.expected == kAll ? self->block->live : b.expected;
}

void complete(Barrier& b) {
  Block& block = *self->block;
  const std::vector<Thread*> waiting = std::move(b.waiting);
  const Clock clock = std::move(b.clock);
  b = Barrier();
  const bool whole_block = waiting.size() == block.live;
  if (whole_block) ++block.phase;
  for (Thread* t : waiting) {
    if (!whole_block) t->clock.join(clock, block.phase);
    if (t != self) worker->ready(t);
  }
  if (whole_block)
    for (size_t w = 0; w < block.warps.size(); ++w) count_banks(block, int(w));
}

void arrive(int id, unsigned expected, const char* what, bool wait) {
  if (id < 0 || id > 15)
    fail(std::string(what) + ": barriers are 0 to 15 (got " + std::to_string(id) + ")");
  if (expected % 32 != 0 || expected > self->block->num_threads)
    fail(std::string(what) + ": a barrier counts whole warps of the block (got " +
         std::to_string(expected) + " threads)");
  Barrier& b = self->block->barriers[id];
  if (b.arrived == 0) b.expected = expected;
  if (b.expected != expected)
    fail(std::string(what) + ": barrier " + std::to_string(id) + " is under way for " +
         std::to_string(b.expected) + " threads (got " + std::to_string(expected) + ")");
  ++b.arrived;
  // A barrier of the whole block orders by the phase alone.
  if (expected != kAll) release(b.clock);
  if (wait) b.waiting.push_back(self);
  if (b.arrived == expected_now(b))
    complete(b);
  else if (wait)
    worker->wait({Wait::Kind::kBarrier, what, uint64_t(id)});
}

}  // namespace

void sync_barrier(int id, unsigned expected, const char* what) { arrive(id, expected, what, true); }

void arrive_barrier(int id, unsigned expected, const char* what) {
  arrive(id, expected, what, false);
}

Meeting& join_meeting(unsigned mask, const char* what) {
  Thread& t = *self;
  Warp& warp = t.block->warps[size_t(t.warp)];
  if (!(mask >> t.lane & 1)) fail(std::string(what) + ": the lane is not in its own mask");
  Meeting& m = mask == kWholeWarp ? warp.whole : warp.meetings[mask];
  if (m.arrived == 0) m.what = what;
  if (m.what != what)
    fail(std::string("lanes of one warp meet in different operations: ") + what + " and " + m.what);
  if (m.arrived >> t.lane & 1) fail(std::string(what) + ": the lane is in this meeting already");
  m.arrived |= 1u << t.lane;
  m.mask = mask;
  return m;
}

void end_meeting(Meeting& m) {
  Block& block = *self->block;
  const size_t first = size_t(self->warp) * 32;
  m.arrived = 0;
  for (int l = 0; l < 32; ++l)
    if ((m.mask >> l & 1) && l != self->lane) worker->ready(&block.threads[first + size_t(l)]);
  if (m.mask == kWholeWarp) count_banks(block, self->warp);
}

void sync_warp(unsigned mask) {
  struct Nothing {};
  Nothing in, out;
  meet(mask, "__syncwarp", in, out, [mask](auto**, auto**) {
    Block& block = *self->block;
    const size_t first = size_t(self->warp) * 32;
    Clock clock;
    for (size_t l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      Thread& t = block.threads[first + l];
      clock.join(t.clock, block.phase);
      clock.set(size_t(t.id), t.now++, block.phase, block.clock_width());
    }
    for (size_t l = 0; l < 32; ++l)
      if (mask >> l & 1) block.threads[first + l].clock.join(clock, block.phase);
  });
}

}  // namespace kn::simt
