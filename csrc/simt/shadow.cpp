#include "simt/shadow.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

#include "simt/thread.h"

namespace kn::simt {
namespace {

constexpr size_t kPage = 16384;          // at least a page on every system
constexpr size_t kAlignment = 1024;      // of the start: an atom of the 128-byte swizzle
constexpr unsigned char kPoison = 0xff;  // makes bf16, fp16 and fp32 NaN

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

std::string at(size_t offset) { return "shared byte " + std::to_string(offset); }

std::string thread_name(const Block& block, uint16_t who) {
  return who == block.engine() ? std::string("an asynchronous copy")
                               : "thread " + std::to_string(who);
}

bool seen(const Thread& t, uint16_t who, uint32_t moment) {
  return who == t.id || t.clock.at(who, t.block->phase) >= moment;
}

}  // namespace

SharedMemory::~SharedMemory() {
  if (memory_) munmap(memory_, capacity_ + kPage);
}

void SharedMemory::reset(size_t bytes) {
  if (!memory_ || round_up(bytes, kPage) > capacity_) {
    if (memory_) munmap(memory_, capacity_ + kPage);
    capacity_ = round_up(std::max<size_t>(bytes, 1), kPage);
    void* p = mmap(nullptr, capacity_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                   -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(p);
    mprotect(memory_ + capacity_, kPage, PROT_NONE);
  }
  bytes_ = bytes;
  data_ = memory_ + capacity_ - round_up(bytes, kAlignment);
  std::memset(data_, kPoison, round_up(bytes, kAlignment));
  cells_.assign((bytes + kCellBytes - 1) / kCellBytes, Cell());
}

bool SharedMemory::in_guard(const void* address) const {
  const char* a = static_cast<const char*>(address);
  return memory_ && a >= memory_ + capacity_ && a < memory_ + capacity_ + kPage;
}

int64_t SharedMemory::first_byte_written_behind() const {
  const size_t end = round_up(bytes_, kAlignment);
  for (size_t i = bytes_; i < end; ++i)
    if (static_cast<unsigned char>(data_[i]) != kPoison) return int64_t(i);
  return -1;
}

size_t SharedMemory::offset(const void* p, size_t bytes, size_t alignment, const char* what) const {
  const ptrdiff_t offset = static_cast<const char*>(p) - data_;
  if (offset < 0 || size_t(offset) + bytes > bytes_)
    fail(std::string(what) + ": out of bounds, " + std::to_string(bytes) + " bytes at byte " +
         std::to_string(offset) + " of " + std::to_string(bytes_) + " of shared memory");
  if (size_t(offset) % alignment != 0)
    fail(std::string(what) + ": misaligned, byte " + std::to_string(offset) +
         " of shared memory is not a multiple of " + std::to_string(alignment));
  return size_t(offset);
}

// An access of a new phase comes after everything of the old one.
void SharedMemory::refresh(Cell& cell) const {
  if (cell.phase == self->block->phase) return;
  cell.phase = self->block->phase;
  cell.writer = kNobody;
  cell.reader[0] = cell.reader[1] = kNobody;
}

void SharedMemory::check_against_writer(Cell& cell, size_t offset, const char* what,
                                        const char* verb) const {
  if (cell.in_flight)
    fail(std::string(what) + " " + verb + " " + at(offset) +
         " while an asynchronous copy into it is in flight (a wait is missing)");
  refresh(cell);
  if (cell.writer != kNobody && !seen(*self, cell.writer, cell.written))
    fail(std::string("race: ") + what + " " + verb + " " + at(offset) + ", which " +
         thread_name(*self->block, cell.writer) +
         " wrote, and nothing orders the two (a barrier is missing)");
}

void SharedMemory::check_against_readers(const Cell& cell, size_t offset, const char* what) const {
  for (int i = 0; i < 2; ++i)
    if (cell.reader[i] != kNobody && !seen(*self, cell.reader[i], cell.read[i]))
      fail(std::string("race: ") + what + " writes " + at(offset) + ", which " +
           thread_name(*self->block, cell.reader[i]) +
           " read, and nothing orders the two (a barrier is missing)");
}

void SharedMemory::check_fence(const Cell& cell, size_t offset, const char* what) const {
  const uint16_t writer = cell.unfenced_by;
  if (writer != kNobody && self->block->threads[writer].fenced <= cell.unfenced)
    fail(std::string(what) + " reads " + at(offset) + ", which " +
         thread_name(*self->block, writer) + " wrote without a fence_proxy_async after it");
}

// Of the readers two are kept, of different warps where possible: enough to see a write that no
// barrier separates from them, unless it is ordered after these two and not after a third.
void SharedMemory::note_reader(Cell& cell) const {
  if (cell.reader[0] != kNobody && cell.reader[0] / 32 != self->warp) {
    cell.reader[1] = cell.reader[0];
    cell.read[1] = cell.read[0];
  }
  cell.reader[0] = uint16_t(self->id);
  cell.read[0] = self->now;
}

void SharedMemory::read(const void* p, size_t bytes, By by, const char* what) {
  const size_t start = size_t(static_cast<const char*>(p) - data_);
  for (size_t i = start / kCellBytes; i < (start + bytes + kCellBytes - 1) / kCellBytes; ++i) {
    Cell& cell = cells_[i];
    check_against_writer(cell, i * kCellBytes, what, "reads");
    if (by == By::kAsyncProxy) check_fence(cell, i * kCellBytes, what);
    note_reader(cell);
  }
}

void SharedMemory::write(const void* p, size_t bytes, const char* what) {
  const size_t start = size_t(static_cast<const char*>(p) - data_);
  for (size_t i = start / kCellBytes; i < (start + bytes + kCellBytes - 1) / kCellBytes; ++i) {
    Cell& cell = cells_[i];
    check_against_writer(cell, i * kCellBytes, what, "writes");
    check_against_readers(cell, i * kCellBytes, what);
    cell.reader[0] = cell.reader[1] = kNobody;
    cell.writer = cell.unfenced_by = uint16_t(self->id);
    cell.written = cell.unfenced = self->now;
  }
}

void SharedMemory::check_initialised(const void* p, size_t bytes, const char* what) {
  const size_t start = size_t(static_cast<const char*>(p) - data_);
  for (size_t i = start / kCellBytes; i < (start + bytes) / kCellBytes; ++i)
    check_against_writer(cells_[i], i * kCellBytes, what, "uses");
}

void SharedMemory::begin_copy(const void* p, size_t bytes, const char* what) {
  const size_t start = size_t(static_cast<const char*>(p) - data_);
  for (size_t i = start / kCellBytes; i < (start + bytes) / kCellBytes; ++i) {
    Cell& cell = cells_[i];
    check_against_writer(cell, i * kCellBytes, what, "writes");
    check_against_readers(cell, i * kCellBytes, what);
    cell.in_flight = 1;
  }
}

void SharedMemory::end_copy(const void* p, size_t bytes, uint16_t writer, uint32_t now) {
  const size_t start = size_t(static_cast<const char*>(p) - data_);
  for (size_t i = start / kCellBytes; i < (start + bytes) / kCellBytes; ++i) {
    Cell& cell = cells_[i];
    refresh(cell);
    cell.in_flight = 0;
    cell.reader[0] = cell.reader[1] = kNobody;
    cell.writer = writer;
    cell.written = now;
    cell.unfenced_by = writer == self->block->engine() ? kNobody : writer;
    cell.unfenced = now;
  }
}

}  // namespace kn::simt
