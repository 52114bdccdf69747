// The only file that includes pybind11. Tensors arrive as addresses; ops.py has checked dtypes,
// shapes and contiguity, the ops themselves check every size relation again. The GIL is released
// for the length of an op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kimi_native/cuda_library.h"
#include "kimi_native/layout.h"
#include "kimi_native/mapped_files.h"
#include "kimi_native/ops.h"
#include "kimi_native/recording.h"
#include "kimi_native/runtime.h"

namespace py = pybind11;
using namespace kn;  // NOLINT: the whole file is about this namespace

namespace {

using Address = uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

// An address as whatever pointer it initializes.
struct Pointer {
  Address address;
  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
};

// One function per op, on the CPU and on a GPU; arguments follow ops.h.
struct Modules {
  py::module_ cpu, cuda;
};

// NAME(arguments of `make`): `make` puts them into the op's Args. On a GPU a stream follows.
template <typename Args, typename... P>
void def_op(Modules& m, const char* name, Args (*make)(P...), void (*op)(const Args&)) {
  m.cpu.def(name, [make, op](P... p) { run(op, make(p...)); }, NoGil());
  m.cuda.def(
      name,
      [make, name](P... p, Address stream) {
        const Args a = make(p...);
        cuda_call(name, &a, Pointer{stream});
      },
      NoGil());
}

// An op with scratch, on a GPU: NAME_workspace_bytes and NAME, with the same arguments before the
// scratch and the stream.
template <typename Args, typename... P>
void def_cuda_op(py::module_& m, const char* name, Args (*make)(P...)) {
  m.def((std::string(name) + "_workspace_bytes").c_str(),
        [make, name](P... p) {
          const Args a = make(p...);
          return cuda_workspace_bytes(name, &a);
        },
        NoGil());
  m.def(
      name,
      [make, name](P... p, Address workspace, int64_t bytes, Address stream) {
        Args a = make(p...);
        a.workspace = Pointer{workspace};
        a.workspace_bytes = bytes;
        cuda_call(name, &a, Pointer{stream});
      },
      NoGil());
}

// An op with scratch is bound twice: NAME_workspace_bytes and NAME, with the same arguments before
// the scratch.
template <typename Args, typename... P>
void def_op(Modules& m, const char* name, Args (*make)(P...), void (*op)(const Args&),
            int64_t (*workspace_bytes)(const Args&)) {
  const std::string sizes = std::string(name) + "_workspace_bytes";
  m.cpu.def(
      sizes.c_str(), [make, workspace_bytes](P... p) { return workspace_bytes(make(p...)); },
      NoGil());
  m.cpu.def(
      name,
      [make, op, workspace_bytes](P... p, Address workspace, int64_t bytes) {
        Args a = make(p...);
        a.workspace = Pointer{workspace};
        a.workspace_bytes = bytes;
        run(op, workspace_bytes, a);
      },
      NoGil());
  def_cuda_op(m.cuda, name, make);
}

MoeRouteArgs moe_route(Address logits, Address correction_bias, Address topk_ids,
                       Address topk_weights, int64_t tokens, int64_t experts, int64_t topk,
                       int64_t n_group, int64_t topk_group, int32_t scoring, int32_t group_score,
                       bool norm_topk_prob, float routed_scaling_factor) {
  return {Pointer{logits},
          Pointer{correction_bias},
          Pointer{topk_ids},
          Pointer{topk_weights},
          tokens,
          experts,
          topk,
          n_group,
          topk_group,
          Scoring(scoring),
          GroupScore(group_score),
          norm_topk_prob,
          routed_scaling_factor};
}

MoeDispatchArgs moe_dispatch(Address topk_ids, Address token_index, Address row_index,
                             Address expert_offsets, int64_t tokens, int64_t topk,
                             int64_t experts) {
  return {Pointer{topk_ids},
          Pointer{token_index},
          Pointer{row_index},
          Pointer{expert_offsets},
          tokens,
          topk,
          experts};
}

MoeCombineArgs moe_combine(Address rows, Address row_index, Address topk_weights, Address shared,
                           Address out, int32_t rows_dtype, int32_t out_dtype, int64_t tokens,
                           int64_t topk, int64_t hidden) {
  return {Pointer{rows},
          Pointer{row_index},
          Pointer{topk_weights},
          Pointer{shared},
          Pointer{out},
          DType(rows_dtype),
          DType(out_dtype),
          tokens,
          topk,
          hidden};
}

Int4GemmArgs int4_gemm(Address x, Address weight_packed, Address weight_scale, Address y,
                       int32_t x_dtype, int32_t y_dtype, int64_t tokens, int64_t out, int64_t in,
                       int32_t group_size, int32_t compute) {
  return {Pointer{x},
          Pointer{weight_packed},
          Pointer{weight_scale},
          Pointer{y},
          DType(x_dtype),
          DType(y_dtype),
          tokens,
          out,
          in,
          group_size,
          Compute(compute),
          nullptr,
          0};
}

Int4GroupedGemmArgs int4_grouped_gemm(Address x, Address x_index, Address expert_offsets,
                                      Address weight_packed, Address weight_scale, Address y,
                                      int32_t x_dtype, int32_t y_dtype, int64_t x_rows,
                                      int64_t rows, int64_t experts, int64_t out, int64_t in,
                                      int32_t group_size, int32_t compute) {
  return {Pointer{x},
          Pointer{x_index},
          Pointer{expert_offsets},
          Pointer{weight_packed},
          Pointer{weight_scale},
          Pointer{y},
          DType(x_dtype),
          DType(y_dtype),
          x_rows,
          rows,
          experts,
          out,
          in,
          group_size,
          Compute(compute),
          nullptr,
          0};
}

Int4GroupedSwigluArgs int4_grouped_swiglu(Address x, Address x_index, Address expert_offsets,
                                          Address gate_packed, Address gate_scale,
                                          Address up_packed, Address up_scale, Address y,
                                          int32_t x_dtype, int32_t y_dtype, int64_t x_rows,
                                          int64_t rows, int64_t experts, int64_t out, int64_t in,
                                          int32_t group_size, int32_t compute) {
  return {Pointer{x},
          Pointer{x_index},
          Pointer{expert_offsets},
          Pointer{gate_packed},
          Pointer{gate_scale},
          Pointer{up_packed},
          Pointer{up_scale},
          Pointer{y},
          DType(x_dtype),
          DType(y_dtype),
          x_rows,
          rows,
          experts,
          out,
          in,
          group_size,
          Compute(compute),
          nullptr,
          0};
}

Bf16GemmArgs bf16_gemm(Address x, Address weight, Address y, int32_t x_dtype, int32_t y_dtype,
                       int64_t tokens, int64_t heads, int64_t out, int64_t in,
                       int64_t x_token_stride, int64_t x_head_stride, int64_t weight_head_stride,
                       int64_t y_token_stride, int64_t y_head_stride) {
  return {Pointer{x},
          Pointer{weight},
          Pointer{y},
          DType(x_dtype),
          DType(y_dtype),
          tokens,
          heads,
          out,
          in,
          x_token_stride,
          x_head_stride,
          weight_head_stride,
          y_token_stride,
          y_head_stride,
          nullptr,
          0};
}

Int8GemmArgs int8_gemm(Address x, Address weight, Address weight_scale, Address y, int32_t x_dtype,
                       int32_t y_dtype, int64_t tokens, int64_t out, int64_t in,
                       int32_t group_size) {
  return {Pointer{x},
          Pointer{weight},
          Pointer{weight_scale},
          Pointer{y},
          DType(x_dtype),
          DType(y_dtype),
          tokens,
          out,
          in,
          group_size,
          nullptr,
          0};
}

Int4QuantizeArgs int4_quantize(Address w, Address weight_packed, Address weight_scale, int64_t out,
                               int64_t in, int32_t group_size) {
  return {Pointer{w}, Pointer{weight_packed}, Pointer{weight_scale}, out, in, group_size};
}

MlaDecodeArgs mla_decode(Address q, Address cache, Address page_table, Address seq_lens,
                         Address out, int32_t q_dtype, int32_t cache_dtype, int64_t batch,
                         int64_t heads, int64_t kv_lora_rank, int64_t qk_rope_head_dim,
                         int64_t pages, int64_t page_size, int64_t max_pages, float softmax_scale,
                         Address splits, int64_t max_splits) {
  return {Pointer{q},
          Pointer{cache},
          Pointer{page_table},
          Pointer{seq_lens},
          Pointer{out},
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
          Pointer{splits},
          max_splits,
          nullptr,
          0};
}

RmsNormArgs rms_norm(Address x, Address weight, Address y, int32_t dtype, int64_t tokens,
                     int64_t hidden, int64_t x_token_stride, float eps) {
  return {Pointer{x}, Pointer{weight}, Pointer{y},     DType(dtype),
          tokens,     hidden,          x_token_stride, eps};
}

AddRmsNormArgs add_rms_norm(Address x, Address residual, Address weight, Address y, Address sum,
                            int32_t dtype, int64_t tokens, int64_t hidden, float eps) {
  return {Pointer{x},   Pointer{residual}, Pointer{weight}, Pointer{y},
          Pointer{sum}, DType(dtype),      tokens,          hidden,
          eps};
}

RopeAppendArgs rope_append(Address q, Address latent, Address k_rope, Address cos, Address sin,
                           Address slots, Address q_out, Address cache, int32_t dtype,
                           int32_t q_out_dtype, int32_t cache_dtype, int64_t tokens, int64_t heads,
                           int64_t kv_lora_rank, int64_t qk_rope_head_dim, int64_t cache_rows,
                           int64_t q_token_stride, int64_t q_head_stride,
                           int64_t q_out_token_stride, int64_t q_out_head_stride,
                           int64_t latent_token_stride, int64_t k_rope_token_stride) {
  return {Pointer{q},
          Pointer{latent},
          Pointer{k_rope},
          Pointer{cos},
          Pointer{sin},
          Pointer{slots},
          Pointer{q_out},
          Pointer{cache},
          DType(dtype),
          DType(q_out_dtype),
          DType(cache_dtype),
          tokens,
          heads,
          kv_lora_rank,
          qk_rope_head_dim,
          cache_rows,
          q_token_stride,
          q_head_stride,
          q_out_token_stride,
          q_out_head_stride,
          latent_token_stride,
          k_rope_token_stride};
}

SwigluArgs swiglu(Address gate, Address up, Address y, int32_t dtype, int64_t tokens,
                  int64_t width) {
  return {Pointer{gate}, Pointer{up}, Pointer{y}, DType(dtype), tokens, width};
}

void bind_ops(Modules& m) {
  def_op(m, "moe_route", moe_route, cpu::moe_route);
  def_op(m, "moe_dispatch", moe_dispatch, cpu::moe_dispatch);
  def_op(m, "moe_combine", moe_combine, cpu::moe_combine);
  def_op(m, "int4_gemm", int4_gemm, cpu::int4_gemm, cpu::int4_gemm_workspace_bytes);
  def_op(m, "int4_grouped_gemm", int4_grouped_gemm, cpu::int4_grouped_gemm,
         cpu::int4_grouped_gemm_workspace_bytes);
  def_op(m, "int4_grouped_swiglu", int4_grouped_swiglu, cpu::int4_grouped_swiglu,
         cpu::int4_grouped_swiglu_workspace_bytes);
  def_op(m, "bf16_gemm", bf16_gemm, cpu::bf16_gemm, cpu::bf16_gemm_workspace_bytes);
  def_op(m, "int8_gemm", int8_gemm, cpu::int8_gemm, cpu::int8_gemm_workspace_bytes);
  def_op(m, "int4_quantize", int4_quantize, cpu::int4_quantize);
  def_op(m, "mla_decode", mla_decode, cpu::mla_decode, cpu::mla_decode_workspace_bytes);
  def_op(m, "rms_norm", rms_norm, cpu::rms_norm);
  def_op(m, "add_rms_norm", add_rms_norm, cpu::add_rms_norm);
  def_op(m, "rope_append", rope_append, cpu::rope_append);
  def_op(m, "swiglu", swiglu, cpu::swiglu);
}

cuda::MlaScheduleArgs mla_schedule(Address seq_lens, int64_t batch, int64_t max_tokens,
                                   int64_t max_splits) {
  return {Pointer{seq_lens}, batch, max_tokens, max_splits, nullptr, 0};
}

cuda::SampleArgs sample(Address logits, Address allowed, Address options, Address top_k,
                        Address ids, int64_t rows, int64_t vocab) {
  return {Pointer{logits}, Pointer{allowed}, Pointer{options},
          Pointer{top_k},  Pointer{ids},     rows,
          vocab,           nullptr,          0};
}

// What a GPU alone has.
void bind_cuda_ops(py::module_& m) {
  m.def(
      "int4_pack",
      [](Address weight_packed, Address weight_scale, Address tiles, Address tile_scales,
         int64_t out, int64_t in, int32_t group_size, Address stream) {
        const cuda::Int4PackArgs a{Pointer{weight_packed},
                                   Pointer{weight_scale},
                                   Pointer{tiles},
                                   Pointer{tile_scales},
                                   out,
                                   in,
                                   group_size};
        cuda_call("int4_pack", &a, Pointer{stream});
      },
      NoGil());
  def_cuda_op(m, "mla_schedule", mla_schedule);
  def_cuda_op(m, "sample", sample);
}

void bind_mapped_files(py::module_& m) {
  m.def(
      "populate_pages",
      [](Address address, int64_t bytes) { return populate_pages(Pointer{address}, bytes); },
      NoGil());
  m.def("watch_mapping",
        [](Address address, int64_t bytes) { return watch_mapping(Pointer{address}, bytes); });
  m.def("unwatch_mapping", &unwatch_mapping);
  m.def("lost_from", &lost_from);
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
  py::class_<CudaLibrary>(m, "CudaLibrary", "The library of CUDA kernels beside this module.")
      .def_readonly("architectures", &CudaLibrary::architectures)
      .def_readonly("error", &CudaLibrary::error);
  m.def("cuda_library", &cuda_library, py::return_value_policy::reference);
  m.def("open_cuda_library", &open_cuda_library, py::arg("path"));
  m.def("int4_tiled_bytes", &int4_tiled_bytes, py::arg("out"), py::arg("in"));
  m.def("int4_tiled_scale_bytes", &int4_tiled_scale_bytes, py::arg("out"), py::arg("in"));
  py::class_<Recording>(m, "Recording", "Calls of ops, to be made again; use ops.record().")
      .def(py::init<>())
      .def("begin", &Recording::begin)
      .def_static("end", &Recording::end)
      .def("replay", &Recording::replay, NoGil())
      .def_property_readonly("num_calls", &Recording::num_calls);

  bind_mapped_files(m);

  Modules modules{m.def_submodule("cpu", "One function per op; arguments follow ops.h."),
                  m.def_submodule("cuda", "The same on a GPU; a stream is the last argument.")};
  bind_ops(modules);
  bind_cuda_ops(modules.cuda);
}
