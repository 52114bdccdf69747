// An op that does nothing, for a benchmark program that must notice.
#include "kimi_native/ops.h"

namespace kn::cuda {

void swiglu(const SwigluArgs&, void*) {}

}  // namespace kn::cuda
