"""kt-kernel's experts from the published INT4 layout (its RAWINT4) on the weights of a layer of experts."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kimi_native.bench.problem import PeerMissing
from kimi_native.errors import RequestError
from kimi_native.weights import GROUP_SIZE

MAX_TOKENS = 4096


class KtKernel:
    """It copies the weights into an order of its own and rounds activations to 8 bits.

    problem  peer_moe.MoeLayer
    """

    name, compute, calls_per_run = "kt-kernel", "w4a8", 1
    spare = 0  # cores left to the thread that waits for the workers: it spins

    def __init__(self, problem: Any, threads: int) -> None:
        try:
            from kt_kernel import kt_kernel_ext as kt
        except ImportError as error:
            raise PeerMissing(f"kt-kernel must be installed ({error})") from None
        if not hasattr(kt.moe, "AMXInt4_KGroup_MOE"):
            raise PeerMissing("kt-kernel must have INT4 experts for this processor")
        self.problem = problem
        with _stdout_to_stderr():
            pool = kt.WorkerPoolConfig()
            pool.subpool_count, pool.subpool_numa_map = 1, [0]
            pool.subpool_thread_count = [max(1, threads - self.spare)]
            self._engine = kt.CPUInfer(pool)
            self._none_elsewhere = torch.zeros(problem.experts, dtype=torch.bool)
            self._layers = [self._layer(kt, *projections) for projections in problem.weights]

    def __del__(self) -> None:
        with _stdout_to_stderr():
            self._layers = self._engine = None

    def _layer(self, kt: Any, gate: Any, up: Any, down: Any) -> Any:
        d = self.problem.dims
        config = kt.moe.MOEConfig(
            d.experts, d.topk, d.hidden, d.intermediate, self._none_elsewhere.data_ptr()
        )
        config.pool, config.max_len = self._engine.backend_, MAX_TOKENS
        for name, projection in (("gate", gate), ("up", up), ("down", down)):
            weights = projection.weights
            setattr(config, f"{name}_projs", [[w.weight_packed.data_ptr() for w in weights]])
            setattr(config, f"{name}_scales", [[w.weight_scale.data_ptr() for w in weights]])
        quant = config.quant_config
        quant.bits, quant.group_size, quant.zero_point = 4, GROUP_SIZE, False
        layer = kt.moe.AMXInt4_KGroup_MOE(config)
        order = torch.arange(d.experts)
        self._engine.submit(layer.load_weights_task(order.data_ptr()))
        self._engine.sync()
        return layer

    def set_tokens(self, tokens: int) -> None:
        if tokens > MAX_TOKENS:
            raise RequestError(
                f"bench peers: tokens must be at most {MAX_TOKENS} for kt-kernel (got {tokens})"
            )
        self._count = torch.tensor([tokens], dtype=torch.int32)
        self._out = torch.empty(tokens, self.problem.dims.hidden, dtype=torch.bfloat16)

    def __call__(self, call: int) -> Tensor:
        p = self.problem
        topk_ids, topk_weights = p.route(call)
        ids = topk_ids.long()
        task = self._layers[p.layer(call)].forward_task(
            self._count.data_ptr(),
            p.dims.topk,
            ids.data_ptr(),
            topk_weights.data_ptr(),
            p.x.data_ptr(),
            self._out.data_ptr(),
            False,
        )
        self._engine.submit(task)
        self._engine.sync(0)
        return self._out


class KtKernelSpare(KtKernel):
    """The same with a core less: faster for few tokens where there are few cores."""

    name, spare = "kt-kernel-spare", 1


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Of native code, which writes lines of its own where our rows go."""
    sys.stdout.flush()
    stdout = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
