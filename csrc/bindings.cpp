// The only file that includes pybind11. Tensors arrive as addresses; ops.py has checked dtypes,
// shapes and contiguity, the ops themselves check every size relation again. The GIL is released
// for the length of an op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kimi_native/ops.h"
#include "kimi_native/runtime.h"

namespace py = pybind11;
using namespace kn;  // NOLINT: the whole file is about this namespace

namespace {

template <typename T>
T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Address = uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

void bind_moe(py::module_& m) {
  m.def(
      "moe_route",
      [](Address logits, Address correction_bias, Address topk_ids, Address topk_weights,
         int64_t tokens, int64_t experts, int64_t topk, int64_t n_group, int64_t topk_group,
         int32_t scoring, int32_t group_score, bool norm_topk_prob, float routed_scaling_factor) {
        cpu::moe_route({ptr<const float>(logits), ptr<const float>(correction_bias),
                        ptr<int32_t>(topk_ids), ptr<float>(topk_weights), tokens, experts, topk,
                        n_group, topk_group, Scoring(scoring), GroupScore(group_score),
                        norm_topk_prob, routed_scaling_factor});
      },
      NoGil());
  m.def(
      "moe_dispatch",
      [](Address topk_ids, Address token_index, Address row_index, Address expert_offsets,
         int64_t tokens, int64_t topk, int64_t experts) {
        cpu::moe_dispatch({ptr<const int32_t>(topk_ids), ptr<int32_t>(token_index),
                           ptr<int32_t>(row_index), ptr<int32_t>(expert_offsets), tokens, topk,
                           experts});
      },
      NoGil());
  m.def(
      "moe_combine",
      [](Address rows, Address row_index, Address topk_weights, Address shared, Address out,
         int32_t rows_dtype, int32_t out_dtype, int64_t tokens, int64_t topk, int64_t hidden) {
        cpu::moe_combine({ptr<const void>(rows), ptr<const int32_t>(row_index),
                          ptr<const float>(topk_weights), ptr<const void>(shared), ptr<void>(out),
                          DType(rows_dtype), DType(out_dtype), tokens, topk, hidden});
      },
      NoGil());
}

// An op with scratch is bound twice: NAME_workspace_bytes and NAME, with the same arguments before
// the scratch.
void bind_int4(py::module_& m) {
  const auto gemm = [](Address x, Address weight_packed, Address weight_scale, Address y,
                       int32_t x_dtype, int32_t y_dtype, int64_t tokens, int64_t out, int64_t in,
                       int32_t group_size) {
    return Int4GemmArgs{ptr<const void>(x),
                        ptr<const uint8_t>(weight_packed),
                        ptr<const bf16>(weight_scale),
                        ptr<void>(y),
                        DType(x_dtype),
                        DType(y_dtype),
                        tokens,
                        out,
                        in,
                        group_size,
                        nullptr,
                        0};
  };
  m.def("int4_gemm_workspace_bytes",
        [gemm](Address x, Address wp, Address ws, Address y, int32_t xd, int32_t yd, int64_t tokens,
               int64_t out, int64_t in, int32_t g) {
          return cpu::int4_gemm_workspace_bytes(gemm(x, wp, ws, y, xd, yd, tokens, out, in, g));
        });
  m.def(
      "int4_gemm",
      [gemm](Address x, Address wp, Address ws, Address y, int32_t xd, int32_t yd, int64_t tokens,
             int64_t out, int64_t in, int32_t g, Address workspace, int64_t workspace_bytes) {
        Int4GemmArgs a = gemm(x, wp, ws, y, xd, yd, tokens, out, in, g);
        a.workspace = ptr<void>(workspace);
        a.workspace_bytes = workspace_bytes;
        cpu::int4_gemm(a);
      },
      NoGil());

  const auto grouped = [](Address x, Address x_index, Address expert_offsets, Address wp,
                          Address ws, Address y, int32_t x_dtype, int32_t y_dtype, int64_t x_rows,
                          int64_t rows, int64_t experts, int64_t out, int64_t in,
                          int32_t group_size) {
    return Int4GroupedGemmArgs{ptr<const void>(x),
                               ptr<const int32_t>(x_index),
                               ptr<const int32_t>(expert_offsets),
                               ptr<const uint8_t* const>(wp),
                               ptr<const bf16* const>(ws),
                               ptr<void>(y),
                               DType(x_dtype),
                               DType(y_dtype),
                               x_rows,
                               rows,
                               experts,
                               out,
                               in,
                               group_size,
                               nullptr,
                               0};
  };
  m.def("int4_grouped_gemm_workspace_bytes",
        [grouped](Address x, Address xi, Address eo, Address wp, Address ws, Address y, int32_t xd,
                  int32_t yd, int64_t x_rows, int64_t rows, int64_t experts, int64_t out,
                  int64_t in, int32_t g) {
          return cpu::int4_grouped_gemm_workspace_bytes(
              grouped(x, xi, eo, wp, ws, y, xd, yd, x_rows, rows, experts, out, in, g));
        });
  m.def(
      "int4_grouped_gemm",
      [grouped](Address x, Address xi, Address eo, Address wp, Address ws, Address y, int32_t xd,
                int32_t yd, int64_t x_rows, int64_t rows, int64_t experts, int64_t out, int64_t in,
                int32_t g, Address workspace, int64_t workspace_bytes) {
        Int4GroupedGemmArgs a =
            grouped(x, xi, eo, wp, ws, y, xd, yd, x_rows, rows, experts, out, in, g);
        a.workspace = ptr<void>(workspace);
        a.workspace_bytes = workspace_bytes;
        cpu::int4_grouped_gemm(a);
      },
      NoGil());

  const auto swiglu = [](Address x, Address x_index, Address expert_offsets, Address gp, Address gs,
                         Address up, Address us, Address y, int32_t x_dtype, int32_t y_dtype,
                         int64_t x_rows, int64_t rows, int64_t experts, int64_t out, int64_t in,
                         int32_t group_size) {
    return Int4GroupedSwigluArgs{ptr<const void>(x),
                                 ptr<const int32_t>(x_index),
                                 ptr<const int32_t>(expert_offsets),
                                 ptr<const uint8_t* const>(gp),
                                 ptr<const bf16* const>(gs),
                                 ptr<const uint8_t* const>(up),
                                 ptr<const bf16* const>(us),
                                 ptr<void>(y),
                                 DType(x_dtype),
                                 DType(y_dtype),
                                 x_rows,
                                 rows,
                                 experts,
                                 out,
                                 in,
                                 group_size,
                                 nullptr,
                                 0};
  };
  m.def("int4_grouped_swiglu_workspace_bytes",
        [swiglu](Address x, Address xi, Address eo, Address gp, Address gs, Address up, Address us,
                 Address y, int32_t xd, int32_t yd, int64_t x_rows, int64_t rows, int64_t experts,
                 int64_t out, int64_t in, int32_t g) {
          return cpu::int4_grouped_swiglu_workspace_bytes(
              swiglu(x, xi, eo, gp, gs, up, us, y, xd, yd, x_rows, rows, experts, out, in, g));
        });
  m.def(
      "int4_grouped_swiglu",
      [swiglu](Address x, Address xi, Address eo, Address gp, Address gs, Address up, Address us,
               Address y, int32_t xd, int32_t yd, int64_t x_rows, int64_t rows, int64_t experts,
               int64_t out, int64_t in, int32_t g, Address workspace, int64_t workspace_bytes) {
        Int4GroupedSwigluArgs a =
            swiglu(x, xi, eo, gp, gs, up, us, y, xd, yd, x_rows, rows, experts, out, in, g);
        a.workspace = ptr<void>(workspace);
        a.workspace_bytes = workspace_bytes;
        cpu::int4_grouped_swiglu(a);
      },
      NoGil());
}

void bind_dense(py::module_& m) {
  const auto bf16_args = [](Address x, Address weight, Address y, int32_t x_dtype, int32_t y_dtype,
                            int64_t tokens, int64_t heads, int64_t out, int64_t in,
                            int64_t x_token_stride, int64_t x_head_stride,
                            int64_t weight_head_stride) {
    return Bf16GemmArgs{ptr<const void>(x),
                        ptr<const bf16>(weight),
                        ptr<void>(y),
                        DType(x_dtype),
                        DType(y_dtype),
                        tokens,
                        heads,
                        out,
                        in,
                        x_token_stride,
                        x_head_stride,
                        weight_head_stride,
                        nullptr,
                        0};
  };
  m.def("bf16_gemm_workspace_bytes",
        [bf16_args](Address x, Address w, Address y, int32_t xd, int32_t yd, int64_t tokens,
                    int64_t heads, int64_t out, int64_t in, int64_t xts, int64_t xhs, int64_t whs) {
          return cpu::bf16_gemm_workspace_bytes(
              bf16_args(x, w, y, xd, yd, tokens, heads, out, in, xts, xhs, whs));
        });
  m.def(
      "bf16_gemm",
      [bf16_args](Address x, Address w, Address y, int32_t xd, int32_t yd, int64_t tokens,
                  int64_t heads, int64_t out, int64_t in, int64_t xts, int64_t xhs, int64_t whs,
                  Address workspace, int64_t workspace_bytes) {
        Bf16GemmArgs a = bf16_args(x, w, y, xd, yd, tokens, heads, out, in, xts, xhs, whs);
        a.workspace = ptr<void>(workspace);
        a.workspace_bytes = workspace_bytes;
        cpu::bf16_gemm(a);
      },
      NoGil());

  const auto int8_args = [](Address x, Address weight, Address weight_scale, Address y,
                            int32_t x_dtype, int32_t y_dtype, int64_t tokens, int64_t out,
                            int64_t in, int32_t group_size) {
    return Int8GemmArgs{ptr<const void>(x),
                        ptr<const int8_t>(weight),
                        ptr<const bf16>(weight_scale),
                        ptr<void>(y),
                        DType(x_dtype),
                        DType(y_dtype),
                        tokens,
                        out,
                        in,
                        group_size,
                        nullptr,
                        0};
  };
  m.def("int8_gemm_workspace_bytes",
        [int8_args](Address x, Address w, Address ws, Address y, int32_t xd, int32_t yd,
                    int64_t tokens, int64_t out, int64_t in, int32_t g) {
          return cpu::int8_gemm_workspace_bytes(int8_args(x, w, ws, y, xd, yd, tokens, out, in, g));
        });
  m.def(
      "int8_gemm",
      [int8_args](Address x, Address w, Address ws, Address y, int32_t xd, int32_t yd,
                  int64_t tokens, int64_t out, int64_t in, int32_t g, Address workspace,
                  int64_t workspace_bytes) {
        Int8GemmArgs a = int8_args(x, w, ws, y, xd, yd, tokens, out, in, g);
        a.workspace = ptr<void>(workspace);
        a.workspace_bytes = workspace_bytes;
        cpu::int8_gemm(a);
      },
      NoGil());

  m.def(
      "rms_norm",
      [](Address x, Address weight, Address y, int32_t dtype, int64_t tokens, int64_t hidden,
         int64_t x_token_stride, float eps) {
        cpu::rms_norm({ptr<const void>(x), ptr<const bf16>(weight), ptr<void>(y), DType(dtype),
                       tokens, hidden, x_token_stride, eps});
      },
      NoGil());
}

void bind_elementwise(py::module_& m) {
  m.def(
      "swiglu",
      [](Address gate, Address up, Address y, int32_t dtype, int64_t tokens, int64_t width) {
        cpu::swiglu({ptr<const void>(gate), ptr<const void>(up), ptr<void>(y), DType(dtype), tokens,
                     width});
      },
      NoGil());
}

void bind_mla(py::module_& m) {
  const auto args = [](Address q, Address cache, Address page_table, Address seq_lens, Address out,
                       int32_t q_dtype, int32_t cache_dtype, int64_t batch, int64_t heads,
                       int64_t kv_lora_rank, int64_t qk_rope_head_dim, int64_t pages,
                       int64_t page_size, int64_t max_pages, float softmax_scale) {
    return MlaDecodeArgs{ptr<const void>(q),
                         ptr<const void>(cache),
                         ptr<const int32_t>(page_table),
                         ptr<const int32_t>(seq_lens),
                         ptr<void>(out),
                         DType(q_dtype),
                         DType(cache_dtype),
                         batch,
                         heads,
                         kv_lora_rank,
                         qk_rope_head_dim,
                         pages,
                         page_size,
                         max_pages,
                         softmax_scale,
                         nullptr,
                         0};
  };
  m.def("mla_decode_workspace_bytes",
        [args](Address q, Address c, Address pt, Address sl, Address o, int32_t qd, int32_t cd,
               int64_t batch, int64_t heads, int64_t lat, int64_t rope, int64_t pages,
               int64_t page_size, int64_t max_pages, float s) {
          return cpu::mla_decode_workspace_bytes(args(q, c, pt, sl, o, qd, cd, batch, heads, lat,
                                                      rope, pages, page_size, max_pages, s));
        });
  m.def(
      "mla_decode",
      [args](Address q, Address c, Address pt, Address sl, Address o, int32_t qd, int32_t cd,
             int64_t batch, int64_t heads, int64_t lat, int64_t rope, int64_t pages,
             int64_t page_size, int64_t max_pages, float s, Address workspace,
             int64_t workspace_bytes) {
        MlaDecodeArgs a =
            args(q, c, pt, sl, o, qd, cd, batch, heads, lat, rope, pages, page_size, max_pages, s);
        a.workspace = ptr<void>(workspace);
        a.workspace_bytes = workspace_bytes;
        cpu::mla_decode(a);
      },
      NoGil());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() =
      "Native kernels of kimi_native. Use kimi_native.ops; this module checks sizes but not "
      "tensors.";
  m.def("cpu_features", &cpu_features);
  m.def("supported_isas", &supported_isas);
  m.def("active_isa", &active_isa);
  m.def("force_isa", &force_isa, py::arg("name"));
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("n"));

  py::module_ cpu_module = m.def_submodule("cpu", "One function per op; arguments follow ops.h.");
  bind_moe(cpu_module);
  bind_int4(cpu_module);
  bind_dense(cpu_module);
  bind_elementwise(cpu_module);
  bind_mla(cpu_module);
}
