// The shim for Python's ctypes: settings, guarded buffers, programs and ops by name. A call returns
// "" or the text of the error, whose first word is its kind.
#include <exception>
#include <stdexcept>
#include <string>

#include "programs.h"
#include "simt/memory.h"
#include "simt/options.h"

namespace {

using namespace kn;  // NOLINT: the whole file is about this namespace

thread_local std::string message;

template <typename F>
const char* call(F f) {
  message.clear();
  try {
    f();
  } catch (const simt::Fault& e) {
    message = std::string("fault ") + e.what();
  } catch (const std::invalid_argument& e) {
    message = std::string("value ") + e.what();
  } catch (const std::exception& e) {
    message = std::string("runtime ") + e.what();
  }
  return message.c_str();
}

}  // namespace

extern "C" {

void kn_simt_options(uint64_t seed, int async, int os_threads, int resident, int hopper) {
  simt::options() = {seed, simt::Async(async), os_threads, resident, hopper != 0};
}

void kn_simt_stats(uint64_t* three) {
  const simt::Stats& s = simt::last_stats();
  three[0] = s.switches;
  three[1] = s.shared_wavefronts;
  three[2] = s.shared_ideal_wavefronts;
}

void* kn_simt_allocate(uint64_t bytes, int front, const char* name) {
  return simt::allocate_guarded(bytes, front ? simt::Flush::kFront : simt::Flush::kEnd, name);
}

const char* kn_simt_free(void* p) {
  return call([=] { simt::free_guarded(p); });
}

const char* kn_simt_program(const char* name, const programs::Buffers* buffers) {
  return call([=] {
    const auto found = programs::all().find(name);
    if (found == programs::all().end())
      throw std::invalid_argument(std::string("no program ") + name);
    found->second(*buffers);
  });
}

}  // extern "C"
