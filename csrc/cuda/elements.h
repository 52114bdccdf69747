// Tensors aligned to their elements, which a CPU's ops do not ask for.
#pragma once
#include <initializer_list>

#include "core/error.h"
#include "kimi_native/types.h"

namespace kn::cuda {

// A tensor and the bytes of its elements, which a GPU reads whole.
struct Elements {
  const void* at;
  int64_t bytes;
};

inline void check_elements(const char* op, std::initializer_list<Elements> tensors) {
  for (const Elements& t : tensors)
    KN_REQUIRE(uintptr_t(t.at) % uintptr_t(t.bytes) == 0, op,
               ": tensors must be aligned to their elements of ", t.bytes, " bytes on a GPU (got ",
               t.at, ")");
}

}  // namespace kn::cuda
