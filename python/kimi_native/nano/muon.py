"""MuonClip: Muon for matrices, AdamW for embeddings, head and vectors, and QK-Clip after the step.

Muon's update has the root mean square of AdamW's (the factor 0.2 sqrt(max(n, m))), so one learning rate serves both.
Sources: Moonlight, arXiv 2502.16982 (Muon at scale); Kimi K2, arXiv 2507.20534, section 2.1 (QK-Clip).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_native.nano.graph import Attention, KimiGraph

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # X <- a X + (b A + c A^2) X with A = X X^T
NEWTON_SCHULZ_STEPS = 5
UPDATE_RMS = 0.2  # of AdamW's updates, measured by Moonlight


@dataclass(frozen=True)
class MuonSettings:
    """momentum (Nesterov) and decay of Muon; betas and eps of AdamW. Vectors do not decay."""

    momentum: float = 0.95
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8


def orthogonalize(m: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrix of each m [..., rows, columns], in `dtype`.

    Singular values end between about 0.7 and 1.2, which serves as well as 1 and costs products alone. Zeros stay zeros.
    """
    a, b, c = NEWTON_SCHULZ
    tall = m.shape[-2] > m.shape[-1]
    x = (m.mT if tall else m).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(m.dtype)


def is_muon_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates a parameter of the graph; stacked experts are matrices each by itself."""
    return parameter.dim() >= 2 and not name.startswith(("model.embed_tokens.", "lm_head."))


class MuonAdamW:
    """The optimizer of a graph. Its state is `tensors()` and `steps`, both changed in place.

    dtype  of Newton-Schulz, torch.bfloat16 as published
    """

    def __init__(
        self,
        graph: KimiGraph,
        settings: MuonSettings | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.settings, self.dtype = settings or MuonSettings(), dtype
        named = dict(graph.named_parameters())
        self.matrices = {n: p for n, p in named.items() if is_muon_matrix(n, p)}
        self.others = {n: p for n, p in named.items() if n not in self.matrices}
        self.momentum = {n: torch.zeros_like(p) for n, p in self.matrices.items()}
        self.mean = {n: torch.zeros_like(p) for n, p in self.others.items()}
        self.square = {n: torch.zeros_like(p) for n, p in self.others.items()}
        self.steps = 0

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The state that belongs to the weights, by name."""
        for kind in ("momentum", "mean", "square"):
            for name, tensor in getattr(self, kind).items():
                yield f"{kind}.{name}", tensor

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update from the gradients, which every parameter must have."""
        self.steps += 1
        by_shape: dict[tuple[int, int], list[str]] = {}
        for name, p in self.matrices.items():
            by_shape.setdefault((p.shape[-2], p.shape[-1]), []).append(name)
        for names in by_shape.values():
            self._muon(names, learning_rate)
        for name, p in self.others.items():
            self._adamw(name, p, learning_rate)

    def _muon(self, names: list[str], learning_rate: float) -> None:
        """All matrices of one shape together: one batched product instead of many small ones."""
        beta, lookahead = self.settings.momentum, []
        for name in names:
            grad = _grad(name, self.matrices[name])
            momentum = self.momentum[name].mul_(beta).add_(grad)
            lookahead.append(grad.add(momentum, alpha=beta).reshape(-1, *grad.shape[-2:]))
        update = orthogonalize(torch.cat(lookahead), self.dtype)
        scale = UPDATE_RMS * max(update.shape[-2:]) ** 0.5
        for name, part in zip(names, update.split([len(b) for b in lookahead]), strict=True):
            p = self.matrices[name]
            p.mul_(1 - learning_rate * self.settings.weight_decay)
            p.sub_(part.view(p.shape), alpha=learning_rate * scale)

    def _adamw(self, name: str, p: Tensor, learning_rate: float) -> None:
        (beta1, beta2), grad = self.settings.betas, _grad(name, p)
        mean = self.mean[name].lerp_(grad, 1 - beta1)
        square = self.square[name].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if p.dim() >= 2:
            p.mul_(1 - learning_rate * self.settings.weight_decay)
        root = (square / (1 - beta2**self.steps)).sqrt_().add_(self.settings.eps)
        p.addcdiv_(mean, root, value=-learning_rate / (1 - beta1**self.steps))


def _grad(name: str, p: Tensor) -> Tensor:
    if p.grad is None:
        raise ValueError(f"muon: {name} must have a gradient (got None)")
    return p.grad


@torch.no_grad()
def qk_clip(graph: KimiGraph, max_logits: Tensor, threshold: float) -> int:
    """Scale down the heads whose largest logit went beyond the threshold, so that it would have been the threshold.

    max_logits  [layers, heads], GraphOutput.max_logits of the step's batch
    returns     how many heads were scaled

    Per head with gamma = threshold / logit: the query's nope rows and the key's nope rows by sqrt(gamma) each, the
    query's rope rows by gamma; the rope key is shared by all heads and stays.
    """
    clipped = 0
    for layer, logits in zip(graph.model.layers, max_logits.tolist(), strict=True):
        for head, logit in enumerate(logits):
            if logit > threshold:
                _scale_head(layer.self_attn, head, threshold / logit)
                clipped += 1
    return clipped


def _scale_head(attention: Attention, head: int, gamma: float) -> None:
    query = attention.query_proj().weight.unflatten(0, (attention.heads, -1))[head]
    key = attention.kv_b_proj.weight.unflatten(0, (attention.heads, -1))[head]
    query[: attention.nope].mul_(gamma**0.5)
    query[attention.nope :].mul_(gamma)
    key[: attention.nope].mul_(gamma**0.5)
