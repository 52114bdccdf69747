#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace kn::simt {
namespace {

constexpr size_t kGuardBytes = 16384;  // at least a page on every system
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;  // frames carry red zones
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

// The context that was left last, on this OS thread: its stack is reported when it is left first.
[[maybe_unused]] thread_local Context* left = nullptr;

// AddressSanitizer remembers the frames of a fiber that never returned from them.
void forget_frames([[maybe_unused]] const Stack& stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack.bottom(), Stack::bytes());
#endif
}

}  // namespace

Stack::Stack() {
  void* p = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(p);
  mprotect(memory_, kGuardBytes, PROT_NONE);
}

Stack::~Stack() {
  if (!memory_) return;
  forget_frames(*this);  // the next mapping at this address has none
  munmap(memory_, kGuardBytes + kStackBytes);
}

char* Stack::bottom() const { return memory_ + kGuardBytes; }
size_t Stack::bytes() { return kStackBytes; }

bool Stack::in_guard(const void* address) const {
  const char* a = static_cast<const char*>(address);
  return a >= memory_ && a < memory_ + kGuardBytes;
}

#ifdef KN_SIMT_USES_UCONTEXT

void prepare(Context& context, const Stack& stack, void (*entry)()) {
  getcontext(&context.place);
  context.place.uc_stack.ss_sp = stack.bottom();
  context.place.uc_stack.ss_size = Stack::bytes();
  context.place.uc_link = nullptr;
  makecontext(&context.place, entry, 0);
  context.bottom = stack.bottom();
  context.bytes = Stack::bytes();
}

static void switch_stack(Context& from, Context& to) { swapcontext(&from.place, &to.place); }

#else

// Saves what the System V calling convention lets a callee keep, and takes the other side's.
extern "C" void kn_simt_switch(void** save, void* to);
asm(R"(
.text
.hidden kn_simt_switch
.globl kn_simt_switch
.type kn_simt_switch,@function
kn_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kn_simt_switch,.-kn_simt_switch
)");

void prepare(Context& context, const Stack& stack, void (*entry)()) {
  forget_frames(stack);
  auto top = reinterpret_cast<uintptr_t>(stack.bottom() + Stack::bytes()) & ~uintptr_t(15);
  auto** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;                         // a frame that nobody returns to
  *--sp = reinterpret_cast<void*>(entry);  // `ret` enters here with sp = 8 mod 16, as after a call
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  context.sp = sp;
  context.bottom = stack.bottom();
  context.bytes = Stack::bytes();
}

static void switch_stack(Context& from, Context& to) { kn_simt_switch(&from.sp, to.sp); }

#endif

#if defined(__SANITIZE_ADDRESS__)

void enter_fiber() { __sanitizer_finish_switch_fiber(nullptr, &left->bottom, &left->bytes); }

void switch_to(Context& from, Context& to, bool last) {
  left = &from;
  __sanitizer_start_switch_fiber(last ? nullptr : &from.shadow, to.bottom, to.bytes);
  switch_stack(from, to);
  __sanitizer_finish_switch_fiber(from.shadow, &left->bottom, &left->bytes);
}

#else

void enter_fiber() {}
void switch_to(Context& from, Context& to, bool) { switch_stack(from, to); }

#endif

}  // namespace kn::simt
