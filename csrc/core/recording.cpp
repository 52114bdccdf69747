#include "kimi_native/recording.h"

#include <stdexcept>

namespace kn {
namespace {

thread_local Recording* current = nullptr;

}  // namespace

void* Scratch::reserve(int64_t bytes) {
  constexpr int64_t kAlignment = 64;
  if (bytes > bytes_ || !memory_) {
    memory_.reset();  // before the new one, not beside it
    memory_.reset(new uint8_t[size_t(bytes + kAlignment)]);
    bytes_ = bytes;
  }
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
  return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

void Recording::begin() {
  if (current) throw std::runtime_error("recording: this thread is recording already");
  calls_.clear();
  current = this;
}

void Recording::end() { current = nullptr; }

Recording* Recording::active() { return current; }

void Recording::replay() {
  for (const auto& call : calls_) call(scratch_);
}

}  // namespace kn
