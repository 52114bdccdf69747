// Hardware faults of a kernel (an inaccessible page, a trapped misaligned access) become reports.
#pragma once
#include <memory>

namespace kn::simt {

// While one exists, SIGSEGV, SIGBUS and SIGILL in a CUDA thread end the launch with a Fault; those
// of other code go where they went before.
class SignalHandlers {
 public:
  SignalHandlers();
  ~SignalHandlers();
  SignalHandlers(const SignalHandlers&) = delete;
  SignalHandlers& operator=(const SignalHandlers&) = delete;
};

// A stack for the handler on this OS thread: the faulting one may be full.
class SignalStack {
 public:
  SignalStack();
  ~SignalStack();
  SignalStack(const SignalStack&) = delete;
  SignalStack& operator=(const SignalStack&) = delete;

 private:
  struct Saved;
  std::unique_ptr<Saved> saved_;
};

}  // namespace kn::simt
