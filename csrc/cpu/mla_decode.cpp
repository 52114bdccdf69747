#include "core/error.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

int64_t mla_decode_workspace_bytes(const MlaDecodeArgs&) { return 0; }

void mla_decode(const MlaDecodeArgs&) { throw std::runtime_error("mla_decode: not written yet"); }

}  // namespace kn::cpu
