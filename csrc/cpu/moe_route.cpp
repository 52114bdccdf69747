#include "core/error.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

void moe_route(const MoeRouteArgs&) { throw std::runtime_error("moe_route: not written yet"); }

}  // namespace kn::cpu
