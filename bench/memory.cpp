#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <fstream>
#include <new>
#include <string>
#include <utility>

namespace kn::bench {

static constexpr int64_t kHugePage = int64_t(2) << 20;

int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t largest = 0;
    for (int index = 0; index < 8; ++index) {
      std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) +
                         "/size");
      int64_t size = 0;
      char unit = 0;
      if (!(file >> size)) break;
      file >> unit;
      largest = std::max(largest, size << (unit == 'M' ? 20 : unit == 'K' ? 10 : 0));
    }
    return largest ? largest : int64_t(32) << 20;
  }();
  return bytes;
}

int64_t rotation_bytes() { return std::min(2 * last_level_cache_bytes(), kMaxRotationBytes); }

int64_t num_copies(int64_t bytes) {
  return std::clamp<int64_t>((rotation_bytes() + bytes - 1) / bytes, 2, 4096);
}

Memory::Memory(int64_t bytes, Pages pages)
    : bytes_(std::max<int64_t>(bytes, 1)), mapped_(bytes_ + 2 * kHugePage) {
  mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  const uint64_t start = (reinterpret_cast<uint64_t>(mapping_) + kHugePage - 1) & -kHugePage;
  data_ = reinterpret_cast<uint8_t*>(start);
  madvise(mapping_, mapped_, pages == Pages::k2MiB ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

Memory::Memory(Memory&& other) noexcept
    : data_(other.data_), bytes_(other.bytes_), mapped_(other.mapped_), mapping_(other.mapping_) {
  other.mapping_ = nullptr;
}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(mapped_, other.mapped_);
  std::swap(mapping_, other.mapping_);
  return *this;
}

Memory::~Memory() {
  if (mapping_) munmap(mapping_, mapped_);
}

}  // namespace kn::bench
