// Arrays on the device.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "../values.h"
#include "gpu.h"

namespace kn::bench::gpu {

// Starts as NaN.
template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(int64_t n)
      : data_(static_cast<T*>(allocate(std::max<int64_t>(n, 1) * int64_t(sizeof(T))))), n_(n) {}
  explicit DeviceBuffer(const std::vector<T>& host) : DeviceBuffer(int64_t(host.size())) {
    copy(data_, host.data(), n_ * int64_t(sizeof(T)));
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), n_(other.n_) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(n_, other.n_);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_) release(data_);
  }
  T* data() const { return data_; }
  int64_t size() const { return n_; }
  std::vector<T> read(int64_t first, int64_t count) const {
    std::vector<T> host(count);
    copy(host.data(), data_ + first, count * int64_t(sizeof(T)));
    return host;
  }
  std::vector<T> read() const { return read(0, n_); }

 private:
  T* data_;
  int64_t n_;
};

// Random entries that the host knows too: a block of up to a million, repeated. Its length is a
// prime, so that no two rows of a matrix are the same.
template <typename T>
class RandomBuffer {
 public:
  template <typename F>
  RandomBuffer(int64_t n, F&& entry)
      : RandomBuffer(n, 1000003,
                     [&](T* block, int64_t count) { std::generate(block, block + count, entry); }) {
  }
  // fill(block, count) makes the block, of at most `block_size` entries.
  template <typename F>
  RandomBuffer(int64_t n, int64_t block_size, F&& fill)
      : buffer_(n), block_(std::min(n, block_size)) {
    fill(block_.data(), int64_t(block_.size()));
    int64_t filled = int64_t(block_.size());
    copy(data(), block_.data(), filled * int64_t(sizeof(T)));
    for (int64_t more; filled < n; filled += more) {
      more = std::min(filled, n - filled);
      enqueue_copy(data() + filled, data(), more * int64_t(sizeof(T)));
    }
    synchronize("fill");
  }
  T* data() const { return buffer_.data(); }
  int64_t size() const { return buffer_.size(); }
  T operator[](int64_t i) const { return *at(i); }
  // Entry i and those after it, up to the end of the block.
  const T* at(int64_t i) const { return &block_[i % int64_t(block_.size())]; }

 private:
  DeviceBuffer<T> buffer_;
  std::vector<T> block_;
};

inline RandomBuffer<bf16> random_bf16(int64_t n, Random& random) {
  return RandomBuffer<bf16>(n, [&] { return to_bf16(random.sign()); });
}

// Scratch of an op, in its Args.
template <typename Args>
DeviceBuffer<uint8_t> give_workspace(Args& a, int64_t bytes) {
  DeviceBuffer<uint8_t> workspace(bytes);
  a.workspace = workspace.data();
  a.workspace_bytes = bytes;
  return workspace;
}

}  // namespace kn::bench::gpu
