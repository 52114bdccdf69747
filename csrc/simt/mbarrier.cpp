// mbarriers, and the bulk copies that complete them.
#include <cstring>

#include "simt/ptx_sm90.h"

namespace kn::ptx {
namespace {

using simt::Block;
using simt::fail;
using simt::Mbarrier;
using simt::self;
using simt::Thread;

// What the 8 bytes hold here: a kernel that writes over them is found out.
constexpr uint64_t kMagic = 0x6d62617272696572;

Mbarrier& find(void* p, const char* what) {
  Block& block = *self->block;
  const size_t offset = block.shared.offset(p, 8, 8, what);
  const auto found = block.mbarriers.find(offset);
  uint64_t bytes;
  std::memcpy(&bytes, p, 8);
  if (found == block.mbarriers.end() || bytes != kMagic)
    fail(std::string(what) + ": no mbarrier at byte " + std::to_string(offset) +
         " (not initialised, or written over)");
  block.shared.check_initialised(p, 8, what);
  return found->second;
}

void end_phase_if_complete(Mbarrier& m) {
  if (m.pending != 0 || m.bytes != 0) return;
  Block& block = *self->block;
  m.parity ^= 1;
  m.pending = int(m.count);
  m.completed.join(m.arriving, block.phase);
  for (Thread* t : m.waiting) {
    t->clock.join(m.completed, block.phase);
    simt::worker->ready(t);
  }
  m.waiting.clear();
}

void arrive(void* p, int64_t bytes, const char* what) {
  Mbarrier& m = find(p, what);
  if (m.pending == 0)
    fail(std::string(what) + ": more arrivals than the " + std::to_string(m.count) + " of a phase");
  simt::release(m.arriving);
  m.bytes += bytes;
  --m.pending;
  end_phase_if_complete(m);
}

// The engine has written [to, to + bytes) and tells the mbarrier.
void complete(Mbarrier& m, int64_t bytes) {
  Block& block = *self->block;
  m.arriving.set(block.engine(), block.async_now, block.phase, block.clock_width());
  m.bytes -= bytes;
  end_phase_if_complete(m);
}

// Bytes of a swizzled box at `offset` in shared memory.
size_t swizzled(size_t offset, Swizzle s) {
  const size_t mask = s == Swizzle::k128 ? 7 : s == Swizzle::k64 ? 3 : s == Swizzle::k32 ? 1 : 0;
  return offset ^ ((offset >> 7 & mask) << 4);
}

void copy_box(const TensorMap& map, size_t to, int64_t column, int64_t row) {
  char* shared = self->block->shared.data();
  const int box_row = map.box_columns * map.element_bytes;
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < map.box_columns; ++c) {
      const bool inside =
          row + r >= 0 && row + r < map.rows && column + c >= 0 && column + c < map.columns;
      const size_t at = swizzled(to + size_t(r * box_row + c * map.element_bytes), map.swizzle);
      if (inside)
        std::memcpy(shared + at,
                    map.base + (row + r) * map.row_bytes + (column + c) * map.element_bytes,
                    size_t(map.element_bytes));
      else
        std::memset(shared + at, 0, size_t(map.element_bytes));
    }
  }
}

}  // namespace

void mbarrier_init(void* p, int arrivals) {
  Block& block = *self->block;
  const size_t offset = block.shared.offset(p, 8, 8, "mbarrier_init");
  if (arrivals < 1) fail("mbarrier_init: arrivals must be positive");
  if (block.mbarriers.count(offset) && !block.mbarriers[offset].waiting.empty())
    fail("mbarrier_init: threads wait on this mbarrier");
  block.shared.write(p, 8, "mbarrier_init");
  std::memcpy(p, &kMagic, 8);
  Mbarrier m;
  m.count = unsigned(arrivals);
  m.pending = arrivals;
  block.mbarriers[offset] = std::move(m);
}

void mbarrier_arrive(void* p) { arrive(p, 0, "mbarrier_arrive"); }
void mbarrier_arrive_expect(void* p, int bytes) { arrive(p, bytes, "mbarrier_arrive_expect"); }

void mbarrier_wait(void* p, int parity) {
  Mbarrier& m = find(p, "mbarrier_wait");
  if (m.parity != unsigned(parity)) {
    simt::acquire(m.completed);
    return;
  }
  m.waiting.push_back(self);
  const size_t offset = size_t(static_cast<char*>(p) - self->block->shared.data());
  simt::worker->wait({simt::Wait::Kind::kMbarrier, "mbarrier_wait", offset});
}

void fence_proxy_async() { self->fenced = ++self->now; }

void bulk_copy(void* to, const void* from, int bytes, void* barrier) {
  Mbarrier& m = find(barrier, "bulk_copy");
  if (bytes <= 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail("bulk_copy: size and source must be multiples of 16 (got " + std::to_string(bytes) + ")");
  self->block->shared.offset(to, size_t(bytes), 16, "bulk_copy");
  self->block->shared.begin_copy(to, size_t(bytes), "bulk_copy");
  simt::worker->issue({self, [=, &m] {
                         Block& block = *self->block;
                         std::memcpy(to, from, size_t(bytes));
                         block.shared.end_copy(to, size_t(bytes), uint16_t(block.engine()),
                                               ++block.async_now);
                         complete(m, bytes);
                       }});
}

void tma_load_2d(void* to, const TensorMap* map, int column, int row, void* barrier) {
  Mbarrier& m = find(barrier, "tma_load_2d");
  const TensorMap box = *map;
  const size_t bytes = size_t(box.box_columns) * size_t(box.box_rows) * size_t(box.element_bytes);
  const size_t offset = self->block->shared.offset(to, bytes, 128, "tma_load_2d");
  self->block->shared.begin_copy(to, bytes, "tma_load_2d");
  simt::worker->issue({self, [=, &m] {
                         Block& block = *self->block;
                         copy_box(box, offset, column, row);
                         block.shared.end_copy(to, bytes, uint16_t(block.engine()),
                                               ++block.async_now);
                         complete(m, int64_t(bytes));
                       }});
}

}  // namespace kn::ptx
