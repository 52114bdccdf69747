// The signal handler reads a list that only ever grows, through atomics, and calls nothing but
// mmap and sigaction: it may interrupt any thread anywhere, the allocator included.
#include "kimi_native/mapped_files.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <mutex>

#include "core/error.h"

// Linux 5.14; older C libraries do not name it.
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

namespace kn {
namespace {

struct Watch {
  std::atomic<uintptr_t> begin{0}, end{0};  // empty: free to be used again
  std::atomic<int64_t> lost{-1};
  int64_t number = 0;
  Watch* next = nullptr;  // set before the watch is published, then constant
};

std::mutex mutex;                    // of those who change the list; the handler does not wait
std::atomic<Watch*> first{nullptr};  // never freed: a handler may be reading
struct sigaction previous;

uintptr_t page_bytes() {
  static const uintptr_t bytes = uintptr_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

Watch* containing(uintptr_t address) {
  for (Watch* w = first.load(std::memory_order_acquire); w; w = w->next)
    if (address >= w->begin.load() && address < w->end.load()) return w;
  return nullptr;
}

// Zeros from the page on, so that what lies behind a truncation costs one signal and not one a
// page.
bool replace_by_zeros(Watch* watch, uintptr_t address) {
  const uintptr_t page = address / page_bytes() * page_bytes();
  if (mmap(reinterpret_cast<void*>(page), watch->end.load() - page, PROT_READ,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
    return false;
  const int64_t offset = int64_t(page - watch->begin.load());
  int64_t lost = -1;
  while (!watch->lost.compare_exchange_weak(lost, offset))
    if (lost >= 0 && lost <= offset) break;
  return true;
}

void on_bus_error(int signal, siginfo_t* info, void*) {
  const int saved = errno;
  const bool fault = info->si_code > 0;  // not sent by a process
  Watch* watch = fault ? containing(reinterpret_cast<uintptr_t>(info->si_addr)) : nullptr;
  if (!watch || !replace_by_zeros(watch, reinterpret_cast<uintptr_t>(info->si_addr))) {
    // Not ours. A fault happens again when this returns, then under the handler that was there
    // before; after that one nobody is left, so two that restore each other cannot go on for ever.
    sigaction(SIGBUS, &previous, nullptr);
    previous = {};
    if (!fault) raise(signal);
  }
  errno = saved;
}

// Under the mutex. Again for every watch: another library may have installed its own meanwhile.
void install_handler() {
  struct sigaction current{};
  sigaction(SIGBUS, nullptr, &current);
  if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == &on_bus_error) return;
  page_bytes();  // not for the first time inside the handler
  previous = current;
  struct sigaction ours{};
  ours.sa_sigaction = &on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, nullptr);
}

Watch* numbered(int64_t number) {
  for (Watch* w = first.load(std::memory_order_acquire); w; w = w->next)
    if (w->number == number && w->end.load() != 0) return w;
  return nullptr;
}

}  // namespace

int populate_pages(const void* address, int64_t bytes) {
  while (madvise(const_cast<void*>(address), size_t(bytes), MADV_POPULATE_READ) != 0)
    if (errno != EINTR) return errno;
  // Under a hypervisor, memory that the disk wrote has no entry in the second page table until a
  // processor touches it: 1 us and more for each 4 KB, paid here beside the disk instead of by the
  // first token. Elsewhere it is one cache line of 64.
  const volatile char* data = static_cast<const char*>(address);
  for (int64_t at = 0; at < bytes; at += 4096) (void)data[at];
  return 0;
}

int64_t watch_mapping(const void* address, int64_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  KN_REQUIRE(begin != 0 && begin % page_bytes() == 0 && bytes > 0,
             "watch_mapping: address must be that of a page, bytes positive (got ", begin, ", ",
             bytes, ")");
  const std::lock_guard<std::mutex> lock(mutex);
  install_handler();
  static int64_t numbers = 0;
  Watch* watch = first.load();
  while (watch && watch->end.load() != 0) watch = watch->next;
  const bool found = watch != nullptr;
  if (!found) {
    watch = new Watch;
    watch->next = first.load();
  }
  watch->number = ++numbers;
  watch->lost.store(-1);
  watch->begin.store(begin);
  watch->end.store((begin + uintptr_t(bytes) + page_bytes() - 1) / page_bytes() * page_bytes());
  if (!found) first.store(watch, std::memory_order_release);
  return watch->number;
}

void unwatch_mapping(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (Watch* watch = numbered(number)) watch->end.store(0);
}

int64_t lost_from(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Watch* watch = numbered(number);
  return watch ? watch->lost.load() : -1;
}

}  // namespace kn
