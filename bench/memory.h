// Memory for benchmarks: buffers on pages of a chosen size, and how much is needed to be cold.
#pragma once
#include <cstdint>

namespace kn::bench {

// Size of the largest cache of the first processor; 32 MiB where the system does not say.
int64_t last_level_cache_bytes();

// What one benchmark may take, whatever the cache: 4 GB, of which other buffers need a part.
static constexpr int64_t kMaxRotationBytes = int64_t(7) << 29;  // 3.5 GiB

// Weights rotate through this much: twice the last-level cache, at most kMaxRotationBytes.
int64_t rotation_bytes();

// Copies of `bytes` of weights that together are rotation_bytes(), at least 2 and at most 4096.
int64_t num_copies(int64_t bytes);

enum class Pages { k4KiB, k2MiB };  // 2 MiB: where the system gives them

// Anonymous memory, aligned to 2 MiB. Not filled: its pages come into being when written.
class Memory {
 public:
  Memory(int64_t bytes, Pages pages);
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();
  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* data_;
  int64_t bytes_, mapped_;
  void* mapping_;
};

}  // namespace kn::bench
