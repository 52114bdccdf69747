#include "simt/shared.h"

namespace kn::simt {
namespace {

void touch(const void* site, const void* p, size_t bytes, size_t alignment, bool write) {
  SharedMemory& shared = self->block->shared;
  const char* what = write ? "store" : "load";
  const size_t offset = shared.offset(p, bytes, alignment, what);
  if (write)
    shared.write(p, bytes, what);
  else
    shared.read(p, bytes, By::kThread, what);
  self->accesses.push_back({site, uint32_t(offset), uint16_t(bytes), write});
}

}  // namespace

__attribute__((noinline)) void touch_read(const void* p, size_t bytes, size_t alignment) {
  touch(__builtin_return_address(0), p, bytes, alignment, false);
}

__attribute__((noinline)) void touch_write(void* p, size_t bytes, size_t alignment) {
  touch(__builtin_return_address(0), p, bytes, alignment, true);
}

}  // namespace kn::simt
