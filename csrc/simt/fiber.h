// A stack and a place in the code: what a CUDA thread becomes on the CPU. A switch costs about as
// much as a function call on x86-64; other processors use ucontext.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) || defined(KN_SIMT_UCONTEXT)
#define KN_SIMT_USES_UCONTEXT 1
#include <ucontext.h>
#endif

namespace kn::simt {

// Memory with an inaccessible page below it: running out of stack is a fault, not a corruption.
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(Stack&& other) noexcept : memory_(other.memory_) { other.memory_ = nullptr; }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const;
  static size_t bytes();
  bool in_guard(const void* address) const;

 private:
  char* memory_ = nullptr;
};

struct Context {
#ifdef KN_SIMT_USES_UCONTEXT
  ucontext_t place;
#else
  void* sp = nullptr;
#endif
  // What AddressSanitizer wants to know about a stack before it is entered.
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* shadow = nullptr;
};

// `context` will start at entry(), which must begin with enter_fiber() and never return.
void prepare(Context& context, const Stack& stack, void (*entry)());
void enter_fiber();

// Leaves `from` and continues `to`; with `last`, `from` is never continued.
void switch_to(Context& from, Context& to, bool last = false);

}  // namespace kn::simt
