#include <chrono>
#include <numeric>
#include <thread>

#include "simt/launch.h"
#include "simt/signals.h"
#include "simt/thread.h"

namespace kn::simt {

thread_local Worker* worker = nullptr;
thread_local Thread* self = nullptr;

namespace {

Options current_options;
Stats current_stats;

constexpr size_t kMaxSharedBytes = 227 * 1024;  // sm_90; sm_80 has 163 KB, sm_86 and 120 have 99
constexpr unsigned kMaxThreads = 1024;
// Turns of every waiting loop without any other progress that count as a deadlock.
constexpr uint64_t kIdleTurns = 64;
constexpr int kIdleRounds = 50;

void thread_main() {
  enter_fiber();
  worker->grid().body();
  worker->finish();
}

// splitmix64
uint64_t mix(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

void check(const Grid& grid) {
  const uint64_t threads = uint64_t(grid.block.x) * grid.block.y * grid.block.z;
  const uint64_t blocks = uint64_t(grid.size.x) * grid.size.y * grid.size.z;
  const std::string name = grid.kernel;
  if (threads == 0 || threads > kMaxThreads || threads % 32 != 0)
    throw Fault(name + ": a block must have a multiple of 32 threads, at most 1024 (got " +
                std::to_string(threads) + ")");
  if (blocks == 0 || grid.size.y > 65535 || grid.size.z > 65535)
    throw Fault(name + ": a grid must have blocks, and at most 65535 in y and z (got " +
                std::to_string(grid.size.x) + ", " + std::to_string(grid.size.y) + ", " +
                std::to_string(grid.size.z) + ")");
  if (grid.shared_bytes > kMaxSharedBytes)
    throw Fault(name + ": shared memory must be at most " + std::to_string(kMaxSharedBytes) +
                " bytes (got " + std::to_string(grid.shared_bytes) + ")");
}

uint3 coordinates(uint64_t i, dim3 size) {
  return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
}

}  // namespace

Options& options() { return current_options; }
const Stats& last_stats() { return current_stats; }

Launch::Launch(Grid g)
    : grid(std::move(g)),
      settings(options()),
      order(uint64_t(grid.size.x) * grid.size.y * grid.size.z) {
  std::iota(order.begin(), order.end(), uint64_t(0));
  uint64_t state = settings.seed;
  if (settings.seed)
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[mix(state) % i]);
}

void Launch::stop(const std::string& message) {
  std::lock_guard<std::mutex> lock(mutex);
  if (fault.empty()) fault = message;
  stopped = true;
}

void run_grid(Grid grid) {
  check(grid);
  if (worker) throw Fault(std::string(grid.kernel) + ": a kernel cannot launch a kernel");
  Launch launch(std::move(grid));
  SignalHandlers handlers;
  const int workers = std::max(1, launch.settings.os_threads);
  auto work = [&launch](int i) {
    SignalStack stack;
    Worker w(launch, launch.settings.seed * 1000003 + uint64_t(i));
    w.run();
  };
  std::vector<std::thread> others;
  for (int i = 1; i < workers; ++i) others.emplace_back(work, i);
  work(0);
  for (auto& t : others) t.join();
  current_stats = launch.stats;
  if (!launch.fault.empty()) throw Fault(launch.fault);
}

Worker::Worker(Launch& launch, uint64_t seed) : launch_(launch), random_(seed) {
  const int resident = std::max(1, launch.settings.resident);
  const Grid& g = launch.grid;
  for (int i = 0; i < resident; ++i) {
    blocks_.push_back(std::make_unique<Block>());
    blocks_.back()->num_threads = g.block.x * g.block.y * g.block.z;
    stacks_.emplace_back();
  }
}

const Options& Worker::settings() const { return launch_.settings; }
bool Worker::on_guard_of_stack(const void* address) const {
  for (const auto& stacks : stacks_)
    for (const Stack& s : stacks)
      if (s.in_guard(address)) return true;
  return false;
}

const Grid& Worker::grid() const { return launch_.grid; }
uint64_t Worker::random() { return mix(random_); }

void Worker::run() {
  worker = this;
  try {
    while (!launch_.stopped && refill()) {
      Thread* t = next();
      if (!t) report_deadlock();
      self = running_ = t;
      switch_to(main_, t->context);
      self = running_ = nullptr;
      retire();
    }
  } catch (const Fault& fault) {
    launch_.stop(fault.what());
  }
  worker = nullptr;
  std::lock_guard<std::mutex> lock(launch_.mutex);
  launch_.stats.switches += stats_.switches;
  launch_.stats.shared_wavefronts += stats_.shared_wavefronts;
  launch_.stats.shared_ideal_wavefronts += stats_.shared_ideal_wavefronts;
}

// Starts blocks in the free slots; false when no block is left or running.
bool Worker::refill() {
  bool running = false;
  for (auto& block : blocks_) {
    if (block->live == 0) {
      const uint64_t i = launch_.next_block++;
      if (i < launch_.order.size()) start_block(*block, launch_.order[i]);
    }
    running |= block->live != 0;
  }
  return running;
}

void Worker::start_block(Block& block, uint64_t id) {
  const Grid& g = launch_.grid;
  std::vector<Stack>& stacks =
      stacks_[size_t(std::find_if(blocks_.begin(), blocks_.end(),
                                  [&](const auto& b) { return b.get() == &block; }) -
                     blocks_.begin())];
  while (stacks.size() < block.num_threads) stacks.emplace_back();
  block.index = coordinates(id, g.size);
  block.live = block.num_threads;
  block.shared.reset(g.shared_bytes);
  block.mbarriers.clear();
  for (Barrier& b : block.barriers) b = Barrier();
  block.warps = std::vector<Warp>(block.num_threads / 32);
  block.threads = std::vector<Thread>(block.num_threads);
  block.phase = 1;
  block.async_now = 0;
  for (unsigned i = 0; i < block.num_threads; ++i) {
    Thread& t = block.threads[i];
    t.block = &block;
    t.index = coordinates(i, g.block);
    t.id = int(i);
    t.warp = int(i / 32);
    t.lane = int(i % 32);
    prepare(t.context, stacks[i], thread_main);
    ready(&t);
  }
}

// The block of the thread that ended last, if all of it has ended.
void Worker::retire() {
  for (auto& block : blocks_) {
    if (block->live != 0 || block->threads.empty()) continue;
    Thread& last = block->threads.back();
    for (size_t w = 0; w < block->warps.size(); ++w) count_banks(*block, int(w));
    if (const int64_t at = block->shared.first_byte_written_behind(); at >= 0)
      throw Fault(place(launch_, last) + ": shared memory written behind its end, at byte " +
                  std::to_string(at) + " of " + std::to_string(block->shared.bytes()));
    if (block->bulk_copies)
      throw Fault(place(launch_, last) + ": the block ended with a bulk copy into it in flight");
    block->threads.clear();
  }
}

Thread* Worker::next() {
  for (;;) {
    const bool idle = head_ == ready_.size();
    if (!bulk_.empty() && (idle || (settings().async == Async::kSeeded && random() % 8 == 0))) {
      complete_a_bulk_copy();
      continue;
    }
    if (idle) return nullptr;
    if (settings().seed)
      std::swap(ready_[head_], ready_[head_ + random() % (ready_.size() - head_)]);
    Thread* t = ready_[head_++];
    if (head_ > 4096) {
      ready_.erase(ready_.begin(), ready_.begin() + ptrdiff_t(head_));
      head_ = 0;
    }
    return t;
  }
}

void Worker::resume(Context& from, bool last) {
  Thread* t = launch_.stopped ? nullptr : next();
  if (t && &t->context == &from) return;
  ++stats_.switches;
  self = running_ = t;
  switch_to(from, t ? t->context : main_, last);
}

void Worker::wait(const Wait& why) {
  spins_ = 0;
  launch_.progress.fetch_add(1, std::memory_order_relaxed);
  Thread* me = self;
  me->wait = why;
  resume(me->context, false);
  me->wait = Wait();
}

void Worker::spin(const char* what) {
  Thread* me = self;
  me->wait = {Wait::Kind::kSpin, what, 0};
  ready(me);
  if (++spins_ > kIdleTurns * (ready_.size() - head_)) {
    spins_ = 0;
    if (!bulk_.empty())
      complete_a_bulk_copy();
    else if (!others_make_progress())
      report_deadlock();
  }
  resume(me->context, false);
  me->wait = Wait();
}

// Another OS thread may be about to end the wait of this one.
bool Worker::others_make_progress() {
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const uint64_t progress = launch_.progress.load(std::memory_order_relaxed);
  idle_rounds_ = progress == seen_progress_ ? idle_rounds_ + 1 : 0;
  seen_progress_ = progress;
  return idle_rounds_ < (settings().os_threads > 1 ? kIdleRounds : 2);
}

void Worker::finish() {
  Thread& t = *self;
  Block& b = *t.block;
  if (!b.warps[size_t(t.warp)].matrix_ops.empty()) fail("wgmma in flight at the thread's end");
  spins_ = 0;
  launch_.progress.fetch_add(1, std::memory_order_relaxed);
  t.done = true;
  --b.live;
  // The threads that have ended no longer count for __syncthreads.
  Barrier& all = b.barriers[0];
  if (b.live && all.arrived == b.live && all.expected == kAll) {
    const std::vector<Thread*> waiting = std::move(all.waiting);
    all = Barrier();
    ++b.phase;
    for (Thread* w : waiting) ready(w);
  }
  if (b.live == 0) {  // to the worker, which starts the next block
    self = running_ = nullptr;
    switch_to(t.context, main_, true);
  }
  resume(t.context, true);
}

void Worker::issue(BulkCopy copy) {
  ++copy.issuer->block->bulk_copies;
  bulk_.push_back(std::move(copy));
  if (settings().async == Async::kEarly || (settings().async == Async::kSeeded && coin()))
    complete_a_bulk_copy();
}

void Worker::complete_a_bulk_copy() {
  const size_t i = settings().seed ? random() % bulk_.size() : 0;
  const BulkCopy copy = std::move(bulk_[i]);
  bulk_.erase(bulk_.begin() + ptrdiff_t(i));
  Thread* me = self;
  self = copy.issuer;
  --copy.issuer->block->bulk_copies;
  copy.run();
  self = me;
}

void Worker::fail(const std::string& message) { stop(place(launch_, *self) + ": " + message); }

// Ends the launch: from the worker's own stack by an exception, else by leaving the thread for
// good. Nothing of it is unwound, so a kernel must not own anything.
void Worker::stop(const std::string& text) {
  launch_.stop(text);
  if (!running_) throw Fault(text);
  Thread* me = running_;
  self = running_ = nullptr;
  switch_to(me->context, main_, true);
  std::terminate();  // never continued
}

void Worker::report_deadlock() {
  std::vector<Block*> blocks;
  for (auto& b : blocks_)
    if (b->live) blocks.push_back(b.get());
  stop(describe_deadlock(launch_, blocks));
}

void fail(const std::string& message) { worker->fail(message); }

}  // namespace kn::simt
