#include "core/error.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

int64_t int4_grouped_swiglu_workspace_bytes(const Int4GroupedSwigluArgs&) { return 0; }

void int4_grouped_swiglu(const Int4GroupedSwigluArgs&) {
  throw std::runtime_error("int4_grouped_swiglu: not written yet");
}

}  // namespace kn::cpu
