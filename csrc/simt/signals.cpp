#include "simt/signals.h"

#include <signal.h>

#include <mutex>
#include <string>
#include <vector>

#include "simt/memory.h"
#include "simt/thread.h"

namespace kn::simt {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL};
constexpr size_t kHandlerStackBytes = 128 * 1024;

std::mutex mutex;
int users = 0;
struct sigaction previous[3];

std::string describe(const void* address) {
  if (self->block->shared.in_guard(address)) return "shared memory accessed behind its end";
  if (worker->on_guard_of_stack(address))
    return "stack overflow (more than " + std::to_string(Stack::bytes()) + " bytes of local data)";
  const std::string buffer = describe_near_buffer(address);
  return buffer.empty() ? "access to an invalid address" : buffer;
}

void on_signal(int signal, siginfo_t* info, void*) {
  if (worker && self) {
    // The handler is left by a switch of stacks and never returns.
    if (signal == SIGILL)
      fail("trap: misaligned access through a typed pointer (or, sanitized, undefined behaviour)");
    fail("out of bounds: " + describe(info->si_addr));
  }
  for (size_t i = 0; i < 3; ++i)
    if (kSignals[i] == signal) sigaction(signal, &previous[i], nullptr);
}

}  // namespace

SignalHandlers::SignalHandlers() {
  std::lock_guard<std::mutex> lock(mutex);
  if (users++) return;
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (size_t i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &previous[i]);
}

SignalHandlers::~SignalHandlers() {
  std::lock_guard<std::mutex> lock(mutex);
  if (--users) return;
  for (size_t i = 0; i < 3; ++i) sigaction(kSignals[i], &previous[i], nullptr);
}

struct SignalStack::Saved {
  stack_t before;
  std::vector<char> memory;
};

SignalStack::SignalStack() : saved_(std::make_unique<Saved>()) {
  saved_->memory.resize(kHandlerStackBytes);
  stack_t stack = {};
  stack.ss_sp = saved_->memory.data();
  stack.ss_size = saved_->memory.size();
  sigaltstack(&stack, &saved_->before);
}

SignalStack::~SignalStack() { sigaltstack(&saved_->before, nullptr); }

}  // namespace kn::simt
