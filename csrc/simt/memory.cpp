#include "simt/memory.h"

#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "simt/options.h"

namespace kn::simt {
namespace {

constexpr size_t kPage = 16384;
constexpr size_t kAlignment = 16;
constexpr unsigned char kCanary = 0xa5;

struct Buffer {
  char* memory;  // kPage inaccessible, `accessible` bytes, kPage inaccessible
  size_t accessible, bytes;
  std::string name;
};

std::mutex mutex;
std::map<const char*, Buffer> buffers;  // by address

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

void* allocate_guarded(size_t bytes, Flush flush, const char* name) {
  const size_t accessible = round_up(bytes + 1, kPage);
  void* p = mmap(nullptr, accessible + 2 * kPage, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  char* memory = static_cast<char*>(p);
  mprotect(memory, kPage, PROT_NONE);
  mprotect(memory + kPage + accessible, kPage, PROT_NONE);
  std::memset(memory + kPage, kCanary, accessible);
  char* data = memory + kPage;
  if (flush == Flush::kEnd) data += accessible - round_up(bytes, kAlignment);
  std::lock_guard<std::mutex> lock(mutex);
  buffers[data] = {memory, accessible, bytes, name};
  return data;
}

void free_guarded(void* p) {
  Buffer b;
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = buffers.find(static_cast<const char*>(p));
    if (found == buffers.end()) throw Fault("free_guarded: not a guarded buffer");
    b = found->second;
    buffers.erase(found);
  }
  const char* data = static_cast<const char*>(p);
  const char* begin = b.memory + kPage;
  ptrdiff_t touched = 0;
  bool clean = true;
  for (const char* c = begin; c < begin + b.accessible && clean; ++c) {
    if (c >= data && c < data + b.bytes) continue;
    clean = static_cast<unsigned char>(*c) == kCanary;
    touched = c - data;
  }
  munmap(b.memory, b.accessible + 2 * kPage);
  if (!clean)
    throw Fault(b.name + ": byte " + std::to_string(touched) + " was written, outside of its " +
                std::to_string(b.bytes) + " bytes");
}

std::string describe_near_buffer(const void* address) {
  const char* a = static_cast<const char*>(address);
  std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [data, b] : buffers) {
    if (a < b.memory || a >= b.memory + b.accessible + 2 * kPage) continue;
    const bool before = a < data;
    return std::to_string(before ? data - a : a - (data + b.bytes)) + " bytes " +
           (before ? "before the start of " : "behind the end of ") + b.name + " (" +
           std::to_string(b.bytes) + " bytes)";
  }
  return "";
}

}  // namespace kn::simt
