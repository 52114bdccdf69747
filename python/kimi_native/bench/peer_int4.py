"""int4_gemm beside torch, ONNX Runtime and OpenVINO: the same nibbles and scales, each in the engine's own form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimi_native import ops
from kimi_native.bench.problem import PeerMissing, Problem, copies_of, num_copies, random_bf16
from kimi_native.weights import GROUP_SIZE, Int4Weight

SHAPES = {
    "k2 gate/up": (2048, 7168),
    "k2 down": (7168, 2048),
    "moonlight gate/up": (1408, 2048),
    "moonlight down": (2048, 1408),
    "tiny": (64, 128),
}
NODES = 4  # matrices per graph of the engines that run graphs


class Int4Gemm(Problem):
    op = "int4_gemm"
    computes = ("exact", "int8")

    def __init__(self, shape: str, out: int, in_: int) -> None:
        self.shape, self.out, self.in_ = shape, out, in_
        generator = torch.Generator().manual_seed(1)
        self.nibbles = torch.randint(0, 16, (out, in_), generator=generator, dtype=torch.uint8)
        self.packed = self.nibbles[:, 0::2] | self.nibbles[:, 1::2] << 4  # [out, in / 2] uint8
        self.scale = (
            0.01 + 0.01 * torch.rand(out, in_ // GROUP_SIZE, generator=generator)
        ).bfloat16()
        self.weight_bytes = self.packed.nbytes + self.scale.nbytes
        # Whole graphs of matrices, so that every engine rotates through the same number.
        self.copies = -(-num_copies(self.weight_bytes) // NODES) * NODES
        words = self.packed.view(torch.int32)
        self.weights = [
            Int4Weight(p, s)
            for p, s in zip(
                copies_of(words, self.copies), copies_of(self.scale, self.copies), strict=True
            )
        ]
        self.num_calls = self.copies
        self.peers = (TorchInt4, OnnxExact, OnnxW4A8, OpenvinoExact, OpenvinoW4A8)

    def set_tokens(self, tokens: int) -> None:
        self.tokens = tokens
        self.x = random_bf16(tokens, self.in_, seed=2)
        self.nbytes = self.weight_bytes + 2 * tokens * (self.in_ + self.out)
        self.flops = 2 * tokens * self.out * self.in_

    def ours(self, call: int) -> Tensor:
        return ops.int4_gemm(self.x, self.weights[call % self.copies], compute=self.compute)


def problems() -> Iterator[tuple[Callable[[], Problem], str]]:
    for name, (out, in_) in SHAPES.items():
        shape = f"{name} {out}x{in_}"
        yield (lambda shape=shape, out=out, in_=in_: Int4Gemm(shape, out, in_)), shape


# ---- torch ----------------------------------------------------------------------------------------------------------


def torch_int4_pack(nibbles: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The form of _weight_int4pack_mm_for_cpu: packed weights and [groups, out, 2] bf16 of scale and zero."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        raise PeerMissing(f"torch {torch.__version__} has no _weight_int4pack_mm_for_cpu")
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.to(torch.int32), 1)
    scales_and_zeros = torch.stack([scale.T, torch.zeros_like(scale.T)], dim=-1).contiguous()
    return packed, scales_and_zeros


def torch_int4_mm(x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, scales_and_zeros)


class TorchInt4:
    name, compute, calls_per_run = "torch-int4", "exact", 1

    def __init__(self, problem: Int4Gemm, threads: int) -> None:
        self.problem = problem
        packed, scales = torch_int4_pack(problem.nibbles, problem.scale)
        self.packed = copies_of(packed, problem.copies)
        self.scales = copies_of(scales, problem.copies)

    def set_tokens(self, tokens: int) -> None:
        pass

    def __call__(self, call: int) -> Tensor:
        i = call % self.problem.copies
        return torch_int4_mm(self.problem.x, self.packed[i], self.scales[i])


# ---- engines that run graphs ----------------------------------------------------------------------------------------


class _Graphs:
    """Graphs of NODES independent matrices each, over one input; a call runs one graph."""

    calls_per_run = NODES

    def __init__(self, problem: Int4Gemm, threads: int) -> None:
        self.problem = problem
        self.graphs = [self.make_graph(threads) for _ in range(problem.copies // NODES)]

    def make_graph(self, threads: int) -> Any:
        raise NotImplementedError

    def set_tokens(self, tokens: int) -> None:
        self.x = self.problem.x.float().numpy()
        for graph in self.graphs:  # the first run of a shape may repack a graph's weights
            self.run(graph)

    def __call__(self, call: int) -> Tensor:
        return torch.from_numpy(self.run(self.graphs[call % len(self.graphs)]))

    def run(self, graph: Any) -> np.ndarray:
        """All products of one graph; returns the first."""
        raise NotImplementedError


class OnnxExact(_Graphs):
    name, compute = "onnxruntime-0", "exact"
    accuracy_level = 0

    pool_threads: int | None = None  # of the pool that all sessions of the process share

    def make_graph(self, threads: int) -> Any:
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise PeerMissing(f"onnxruntime and onnx must be installed ({error})") from None
        if OnnxExact.pool_threads is None:
            onnxruntime.set_global_thread_pool_sizes(threads, 1)
            OnnxExact.pool_threads = threads
        if OnnxExact.pool_threads != threads:
            raise PeerMissing(
                f"onnxruntime keeps the {OnnxExact.pool_threads} threads it began with (got {threads})"
            )
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False  # many sessions' pools would spin side by side
        return onnxruntime.InferenceSession(
            self._onnx_model(onnx).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def _onnx_model(self, onnx: Any) -> Any:
        helper, p = onnx.helper, self.problem
        blocks = p.in_ // GROUP_SIZE
        nodes, initializers = [], []
        for i in range(NODES):
            b = p.packed.numpy().reshape(p.out, blocks, GROUP_SIZE // 2)
            scale = p.scale.float().numpy().reshape(p.out, blocks)
            initializers += [
                onnx.numpy_helper.from_array(b, f"b{i}"),
                onnx.numpy_helper.from_array(scale, f"s{i}"),
            ]
            nodes.append(
                helper.make_node(
                    "MatMulNBits",
                    ["x", f"b{i}", f"s{i}"],
                    [f"y{i}"],
                    domain="com.microsoft",
                    K=p.in_,
                    N=p.out,
                    bits=4,
                    block_size=GROUP_SIZE,
                    accuracy_level=self.accuracy_level,
                )
            )
        value = lambda name, width: helper.make_tensor_value_info(  # noqa: E731
            name, onnx.TensorProto.FLOAT, ["tokens", width]
        )
        outputs = [value(f"y{i}", p.out) for i in range(NODES)]
        graph = helper.make_graph(nodes, "int4", [value("x", p.in_)], outputs, initializers)
        domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=domains, ir_version=10)

    def run(self, graph: Any) -> np.ndarray:
        return graph.run(None, {"x": self.x})[0]


class OnnxW4A8(OnnxExact):
    name, compute = "onnxruntime-4", "w4a8"
    accuracy_level = 4


class OpenvinoExact(_Graphs):
    name, compute = "openvino", "exact"
    dynamic_group = 0  # activations stay as they are

    def __init__(self, problem: Int4Gemm, threads: int) -> None:
        self.memory: list[
            np.ndarray
        ] = []  # a compiled model reads its constants, and does not keep them alive
        super().__init__(problem, threads)

    def make_graph(self, threads: int) -> Any:
        try:
            import openvino as ov
            from openvino import opset13 as o
        except ImportError as error:
            raise PeerMissing(f"openvino must be installed ({error})") from None
        p = self.problem
        groups = p.in_ // GROUP_SIZE
        signed = p.packed.numpy() ^ 0x88  # q + 8 to q, in four bits
        x = o.parameter([-1, p.in_], ov.Type.f32, name="x")
        results = []
        for _ in range(NODES):
            self.memory.append(signed.copy())
            tensor = ov.Tensor(self.memory[-1], ov.Shape([p.out, groups, GROUP_SIZE]), ov.Type.i4)
            scale = p.scale.float().numpy().astype(np.float16).reshape(p.out, groups, 1)
            weight = o.multiply(o.convert(o.constant(tensor), ov.Type.f16), o.constant(scale))
            flat = o.reshape(weight, o.constant([p.out, p.in_]), special_zero=False)
            product = o.matmul(x, o.convert(flat, ov.Type.f32), False, True)
            results.append(o.result(product))
        config = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.dynamic_group,
        }
        return ov.compile_model(
            ov.Model(results, [x], "int4"), "CPU", config
        ).create_infer_request()

    def run(self, graph: Any) -> np.ndarray:
        graph.infer([self.x], share_inputs=True)
        return graph.get_output_tensor(0).data


class OpenvinoW4A8(OpenvinoExact):
    name, compute = "openvino-dq", "w4a8"
    dynamic_group = GROUP_SIZE
