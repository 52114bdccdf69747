#include "core/error.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

void moe_combine(const MoeCombineArgs&) {
  throw std::runtime_error("moe_combine: not written yet");
}

}  // namespace kn::cpu
