// What a running grid is made of: threads, warps, blocks, and the worker (one per OS thread) that
// runs the threads of its resident blocks in turn. Only one of them runs at a time, and it runs
// until it has to wait: between two waits a thread is undisturbed.
#pragma once
#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "simt/clock.h"
#include "simt/fiber.h"
#include "simt/options.h"
#include "simt/shadow.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace kn::simt {

struct Block;
struct Thread;

// Why a thread does not run. `count` of `expected` have come to a barrier.
struct Wait {
  enum class Kind { kNone, kBarrier, kWarp, kMbarrier, kSpin };
  Kind kind = Kind::kNone;
  const char* what = "";  // the operation
  uint64_t id = 0;        // barrier number, lane mask, or offset of the mbarrier
};

// A copy into shared memory that has been issued and has not happened.
struct Copy {
  char* to;
  const char* from;
  int bytes, valid;  // the rest is filled with zeros
  bool made = false;
};

struct Thread {
  Context context;
  Block* block = nullptr;
  uint3 index{};
  int id = 0, warp = 0, lane = 0;
  bool done = false;
  Wait wait;
  std::vector<Copy> open;                // cp.async since the last commit
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
  Clock clock;                           // what this thread has seen of the others
  uint32_t now = 1;                      // its own moment
  uint32_t fenced = 0;                   // its moment at the last fence.proxy.async
  std::vector<SharedAccess> accesses;    // since its warp last met, for the bank counts
};

// A meeting of the lanes in a mask: the last to come works for all.
struct Meeting {
  unsigned arrived = 0, mask = 0;
  const char* what = nullptr;
  const void* in[32];
  void* out[32];
};

struct Barrier {
  unsigned arrived = 0;
  unsigned expected = 0;  // kAll: the threads of the block that have not ended
  std::vector<Thread*> waiting;
  Clock clock;
};
inline constexpr unsigned kAll = 0;

struct Mbarrier {
  unsigned count = 0;   // arrivals per phase
  int pending = 0;      // arrivals still missing in this phase
  int64_t bytes = 0;    // bytes still expected in this phase
  unsigned parity = 0;  // of this phase
  Clock arriving, completed;
  std::vector<Thread*> waiting;
};

// One wgmma of one warp that has been issued and has not happened.
struct WarpGroupOp {
  int group;
  const float* accumulators;  // of the first lane
  std::function<void()> run;
};

struct Warp {
  std::map<unsigned, Meeting> meetings;  // by mask
  Meeting whole;                         // of all 32 lanes
  std::deque<WarpGroupOp> matrix_ops;
  int matrix_group = 0;
  bool matrix_fenced = false;
};

struct Block {
  uint3 index{};
  unsigned num_threads = 0, live = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::map<size_t, Mbarrier> mbarriers;  // by offset in shared memory
  SharedMemory shared;
  uint32_t phase = 1;        // barriers of the whole block so far
  uint32_t async_now = 0;    // moment of the asynchronous copy engine, the clock's last component
  unsigned bulk_copies = 0;  // in flight

  size_t clock_width() const { return threads.size() + 1; }
  size_t engine() const { return threads.size(); }
};

struct Grid {
  const char* kernel;
  dim3 size, block;
  size_t shared_bytes;
  std::function<void()> body;
};

struct Launch;

// A bulk copy in flight: `run` makes it and tells its mbarrier.
struct BulkCopy {
  Thread* issuer;
  std::function<void()> run;
};

class Worker {
 public:
  Worker(Launch& launch, uint64_t seed);

  void run();
  void ready(Thread* t) { ready_.push_back(t); }
  // The running thread waits until somebody calls ready() for it, or ends.
  void wait(const Wait& why);
  void spin(const char* what);
  void finish();
  [[noreturn]] void fail(const std::string& message);
  bool coin() { return random() & 1; }
  void issue(BulkCopy copy);
  void count_shared(uint64_t wavefronts, uint64_t ideal) {
    stats_.shared_wavefronts += wavefronts;
    stats_.shared_ideal_wavefronts += ideal;
  }
  const Options& settings() const;
  bool on_guard_of_stack(const void* address) const;
  const Grid& grid() const;

 private:
  uint64_t random();
  Thread* next();
  void resume(Context& from, bool last);
  void start_block(Block& block, uint64_t id);
  bool refill();
  void retire();
  void complete_a_bulk_copy();
  [[noreturn]] void report_deadlock();
  [[noreturn]] void stop(const std::string& text);
  bool others_make_progress();

  Launch& launch_;
  Context main_;
  Thread* running_ = nullptr;  // whose stack is in use; null: the worker's own
  uint64_t random_;
  std::vector<Thread*> ready_;
  size_t head_ = 0;
  std::vector<BulkCopy> bulk_;
  std::vector<std::unique_ptr<Block>> blocks_;  // slots; a slot is free when live is 0
  std::vector<std::vector<Stack>> stacks_;
  Stats stats_;
  uint64_t spins_ = 0, seen_progress_ = 0;
  int idle_rounds_ = 0;
};

extern thread_local Worker* worker;  // of this OS thread
extern thread_local Thread* self;    // the running CUDA thread

[[noreturn]] void fail(const std::string& message);

// Runs all blocks; throws Fault.
void run_grid(Grid grid);

// Barriers. `expected` threads in all, or kAll. An arrival does not wait.
void sync_barrier(int id, unsigned expected, const char* what);
void arrive_barrier(int id, unsigned expected, const char* what);

// What the running thread has done becomes visible to whoever joins `to`.
void release(Clock& to);
void acquire(const Clock& from);

}  // namespace kn::simt
