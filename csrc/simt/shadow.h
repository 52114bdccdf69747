// Shared memory of a block: bytes that start as NaN, end at an inaccessible page, and are watched.
// For every two bytes a shadow cell knows who wrote and read them last, and whether an asynchronous
// copy into them is in flight.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace kn::simt {

struct Thread;
struct Block;

struct SharedAccess {
  const void* site;  // return address: which access of the kernel this was
  uint32_t offset;
  uint16_t bytes;
  bool write;
};

enum class By : uint8_t { kThread, kAsyncProxy };  // plain access, or TMA and wgmma

class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // Poisons; memory is reserved once, for the largest size seen.
  void reset(size_t bytes);
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool in_guard(const void* address) const;
  // Bytes behind the end that a kernel wrote to: their offset, or -1.
  int64_t first_byte_written_behind() const;

  // The running thread reads or writes. Fails on bounds, alignment, an access that nothing orders
  // after an earlier one, and on bytes that a copy in flight will write.
  void read(const void* p, size_t bytes, By by, const char* what);
  void write(const void* p, size_t bytes, const char* what);
  // An mbarrier's bytes are used: after its initialisation, and without being read or written.
  void check_initialised(const void* p, size_t bytes, const char* what);
  // An asynchronous copy: issued (nobody may touch the bytes), then made by thread or engine
  // `writer` at its moment `now`.
  void begin_copy(const void* p, size_t bytes, const char* what);
  void end_copy(const void* p, size_t bytes, uint16_t writer, uint32_t now);

  // Offset of p; fails unless [p, p + bytes) lies inside and p is aligned.
  size_t offset(const void* p, size_t bytes, size_t alignment, const char* what) const;

 private:
  static constexpr uint16_t kNobody = 0xffff;
  struct Cell {
    uint32_t phase = 0;     // of the times below; those of an earlier phase are ordered
    uint32_t written = 0;   // the writer's moment
    uint32_t read[2] = {};  // the moments of two readers, of different warps if there are two
    uint32_t unfenced = 0;  // moment of the last plain write, for fence.proxy.async
    uint16_t writer = kNobody, reader[2] = {kNobody, kNobody};
    uint16_t unfenced_by = kNobody;
    uint16_t in_flight = 0;
  };
  static constexpr size_t kCellBytes = 2;

  void check_against_writer(Cell& cell, size_t offset, const char* what, const char* verb) const;
  void check_against_readers(const Cell& cell, size_t offset, const char* what) const;
  void check_fence(const Cell& cell, size_t offset, const char* what) const;
  void note_reader(Cell& cell) const;
  void refresh(Cell& cell) const;

  char* data_ = nullptr;
  char* memory_ = nullptr;
  size_t bytes_ = 0, capacity_ = 0;
  std::vector<Cell> cells_;
};

// The accesses of a warp's lanes between two meetings, counted in passes over the 32 banks.
void count_banks(Block& block, int warp);
uint64_t wavefronts(const std::vector<SharedAccess>& lanes, uint64_t* ideal);

}  // namespace kn::simt
