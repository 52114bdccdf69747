// What the programs share, and their list. Each checks its results against float64, then times
// every case the report wants.
#pragma once
#include "device_buffer.h"
#include "kimi_native/ops.h"
#include "report.h"

namespace kn::bench::gpu::programs {

void bf16_gemm(Report&);
void elementwise(Report&);  // rms_norm, add_rms_norm, rope_append, swiglu
void int4_gemm(Report&);
void int4_pack(Report&);
void int8_gemm(Report&);
void mla_decode(Report&);
void moe_layer(Report&);    // int4_grouped_swiglu, int4_grouped_gemm, both, moe_combine, a layer
void moe_routing(Report&);  // moe_route, moe_dispatch, both

}  // namespace kn::bench::gpu::programs
