"""What the ops take besides plain tensors: quantized matrices and the result of moe_dispatch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kimi_native.checks import check_contiguous, check_dtype, require

GROUP_SIZE = 32  # weights that share one scale, along the input dimension


@dataclass(frozen=True)
class Int4Weight:
    """One INT4 matrix in the checkpoint's own layout; the tensors may be views of a mapped file.

    weight_packed  [out, in / 8]   int32, eight nibbles a word, lowest column in the lowest bits, nibble = q + 8
    weight_scale   [out, in / 32]  bf16
    """

    weight_packed: Tensor
    weight_scale: Tensor
    is_tiled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_dtype("Int4Weight", "weight_packed", self.weight_packed, torch.int32)
        check_dtype("Int4Weight", "weight_scale", self.weight_scale, torch.bfloat16)
        check_contiguous("Int4Weight", "weight_packed", self.weight_packed)
        check_contiguous("Int4Weight", "weight_scale", self.weight_scale)
        require(
            self.weight_packed.dim() == 2 and self.in_features % GROUP_SIZE == 0,
            "Int4Weight: weight_packed must be [out, in / 8] with in a multiple of "
            f"{GROUP_SIZE} (got {tuple(self.weight_packed.shape)})",
        )
        expected = (self.out_features, self.in_features // GROUP_SIZE)
        require(
            tuple(self.weight_scale.shape) == expected,
            f"Int4Weight: weight_scale must be {expected} (got {tuple(self.weight_scale.shape)})",
        )

    @property
    def out_features(self) -> int:
        return self.weight_packed.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight_packed.shape[1] * 8


@dataclass(frozen=True)
class Int4TiledWeight:
    """One INT4 matrix in the layout of the CUDA kernels (layout.h), made by quant.tiles from an Int4Weight.

    weight_packed  tiles, uint8, on the GPU
    weight_scale   their scales, uint8, on the GPU
    """

    weight_packed: Tensor
    weight_scale: Tensor
    out_features: int
    in_features: int
    is_tiled: ClassVar[bool] = True


def check_layout(
    op: str, weight: Int4Weight | Int4TiledWeight | Int4ExpertWeights, *, tiled: bool
) -> None:
    """CUDA kernels read tiles and CPU kernels the checkpoint's layout; the wrong one would be read as noise."""
    require(
        weight.is_tiled == tiled,
        f"{op}: weights must be {'tiles' if tiled else 'in the layout of the checkpoint'} on this device "
        f"(got {'tiles' if weight.is_tiled else 'the layout of the checkpoint'}; quant.tiles makes one from the other)",
    )


class Int4ExpertWeights:
    """The same projection of every expert: one pointer per expert, so each may live in its own mapped file.

    weights                          one Int4Weight, or one Int4TiledWeight, per expert, all of one shape
    packed_pointers, scale_pointers  [experts] int64, addresses of their tensors
    """

    is_tiled = False

    def __init__(self, weights: list[Int4Weight] | list[Int4TiledWeight]) -> None:
        require(len(weights) > 0, "Int4ExpertWeights: at least one expert is needed (got 0)")
        shapes = {(w.out_features, w.in_features) for w in weights}
        require(len(shapes) == 1, f"Int4ExpertWeights: experts must share one shape (got {shapes})")
        self.weights = weights
        self.is_tiled = weights[0].is_tiled
        out_features, in_features = shapes.pop()
        self._point(
            [w.weight_packed.data_ptr() for w in weights],
            [w.weight_scale.data_ptr() for w in weights],
            out_features,
            in_features,
            weights[0].weight_packed.device,
        )

    @classmethod
    def at(
        cls,
        packed: list[int],
        scale: list[int],
        out_features: int,
        in_features: int,
        make_weights: Callable[[], list[Int4Weight]],
    ) -> Int4ExpertWeights:
        """Weights whose addresses are known and checked: K2's 69,120 experts' matrices without a tensor for each.

        make_weights  called if somebody asks for `weights`; must keep the memory at the addresses alive
        """
        self = cls.__new__(cls)
        self._make_weights = make_weights
        self._point(packed, scale, out_features, in_features)
        return self

    def _point(
        self,
        packed: list[int],
        scale: list[int],
        out_features: int,
        in_features: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.out_features, self.in_features = out_features, in_features
        self.packed_pointers = torch.tensor(packed, dtype=torch.int64, device=device)
        self.scale_pointers = torch.tensor(scale, dtype=torch.int64, device=device)

    @functools.cached_property
    def weights(self) -> list[Int4Weight]:
        return self._make_weights()

    def __len__(self) -> int:
        return self.packed_pointers.shape[0]


@dataclass(frozen=True)
class Int8Weight:
    """One INT8 matrix: weight [out, in] int8 in [-127, 127], weight_scale [out, in / 32] bf16."""

    weight: Tensor
    weight_scale: Tensor

    def __post_init__(self) -> None:
        check_dtype("Int8Weight", "weight", self.weight, torch.int8)
        check_dtype("Int8Weight", "weight_scale", self.weight_scale, torch.bfloat16)
        check_contiguous("Int8Weight", "weight", self.weight)
        check_contiguous("Int8Weight", "weight_scale", self.weight_scale)
        require(
            self.weight.dim() == 2 and self.in_features % GROUP_SIZE == 0,
            f"Int8Weight: weight must be [out, in] with in a multiple of {GROUP_SIZE} "
            f"(got {tuple(self.weight.shape)})",
        )
        expected = (self.out_features, self.in_features // GROUP_SIZE)
        require(
            tuple(self.weight_scale.shape) == expected,
            f"Int8Weight: weight_scale must be {expected} (got {tuple(self.weight_scale.shape)})",
        )

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]


@dataclass(frozen=True)
class MoeDispatch:
    """Which row of the expert-sorted order belongs to whom; made by moe_dispatch.

    token_index     [tokens * topk]  int32, row -> token
    row_index       [tokens, topk]   int32, (token, slot) -> row
    expert_offsets  [experts + 1]    int32, rows of expert e: expert_offsets[e] .. expert_offsets[e + 1]
    """

    token_index: Tensor
    row_index: Tensor
    expert_offsets: Tensor
