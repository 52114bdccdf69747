#include "core/error.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

void moe_dispatch(const MoeDispatchArgs&) {
  throw std::runtime_error("moe_dispatch: not written yet");
}

}  // namespace kn::cpu
