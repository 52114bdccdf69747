"""Which experts the tokens of a text choose, layer by layer, watched while the model computes them.

The watching is a hook on each router (model.Gate) for as long as a measurement takes; otherwise nothing is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kimi_native.cache import LatentCache
from kimi_native.errors import NonFiniteLogitsError, RequestError
from kimi_native.model import KimiModel, MoE
from kimi_native.prompts import Prompt, prompt_list
from kimi_native.routing_statistics import SHUFFLES, LayerStatistics, layer_statistics
from kimi_native.sampling import SamplingParams, sample
from kimi_native.token_roles import Labels, label_names, token_labels

if TYPE_CHECKING:
    from kimi_native.config import KimiConfig
    from kimi_native.generate import Model

Watch = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class RoutedText:
    """The choices of one text.

    ids            of the prompt and of what the model said after it
    prompt_tokens  how many of them are the prompt's
    tokens         what each id stands for, control tokens by their names, parts of a character as \\xe6
    labels         one of Routing.label_names for each id
    experts        [tokens, layers, topk] int32, in the order in which the router gives them
    weights        [tokens, layers, topk] float32
    """

    ids: list[int]
    prompt_tokens: int
    tokens: list[str]
    labels: list[str]
    experts: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Routing:
    """What was measured.

    layers       indices of the layers with experts, in the model, dense layers counted
    num_experts  routed experts of each
    label_names  token_roles.ROLES or token_roles.CHARACTERS
    """

    layers: tuple[int, ...]
    num_experts: int
    label_names: tuple[str, ...]
    texts: tuple[RoutedText, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(text.ids) for text in self.texts)

    @property
    def topk(self) -> int:
        return self.texts[0].experts.shape[2]

    def labels(self) -> np.ndarray:
        """[tokens] int64 over all texts: the label of each token by its place in label_names."""
        place = {name: i for i, name in enumerate(self.label_names)}
        return np.array([place[name] for text in self.texts for name in text.labels])

    def statistics(self, *, shuffles: int = SHUFFLES, seed: int = 0) -> list[LayerStatistics]:
        """One LayerStatistics per layer, over the tokens of all texts."""
        labels = self.labels()
        return [
            layer_statistics(
                layer,
                np.concatenate([text.experts[:, i] for text in self.texts]),
                np.concatenate([text.weights[:, i] for text in self.texts]),
                labels,
                num_experts=self.num_experts,
                num_labels=len(self.label_names),
                shuffles=shuffles,
                seed=seed,
            )
            for i, layer in enumerate(self.layers)
        ]


def measure_routing(
    model: Model,
    prompt: Prompt | Sequence[Prompt],
    *,
    raw_prompt: bool = False,
    max_tokens: int = 0,
    labels: Labels = "auto",
    **options: Any,
) -> Routing:
    """Computes prompts and keeps which experts every token chose, with which weights.

    prompt, raw_prompt  as of Model.generate; a list of prompts is measured one after the other
    max_tokens          then answers each greedily, so far at most, to an end token or the end of the context
    labels              what tokens are told apart by: token_roles.ROLES, CHARACTERS, or by what the texts are
    options             of chat.template.render, such as tools

    Other requests to the model wait. Its cache is not used.

    Raises RequestError for a model without experts or a bad argument, before any compute; NonFiniteLogitsError,
    ModelFormatError if a weight file was truncated meanwhile.
    """
    check_experts(model.config)
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0:
        raise RequestError(
            f"routing: max_tokens must be an integer of at least 0 (got {max_tokens!r})"
        )
    prompts = prompt_list(prompt) or [prompt]
    each = [model.prompt_ids(p, raw_prompt=raw_prompt, **options) for p in prompts]
    names = label_names(each, model.tokenizer, labels)
    texts = []
    with model.held_network() as network:
        for ids in each:
            limit = min(max_tokens, model.max_context - len(ids))
            texts.append(_routed(network, model, ids, limit, names))
    layers = tuple(layer for layer, _ in _routers(network))
    return Routing(layers, model.config.n_routed_experts, names, tuple(texts))


def check_experts(config: KimiConfig) -> None:
    """Raises RequestError, naming the key of config.json, for a model whose tokens have no choice of experts."""
    if config.n_routed_experts is None:
        raise RequestError(
            "routing: the model must have experts (got n_routed_experts null in config.json)"
        )
    if not any(map(config.is_moe_layer, range(config.num_hidden_layers))):
        raise RequestError(
            "routing: the model must have a layer with experts (got first_k_dense_replace="
            f"{config.first_k_dense_replace} of {config.num_hidden_layers} layers in config.json)"
        )


def _routed(
    network: KimiModel, model: Model, ids: list[int], max_tokens: int, names: tuple[str, ...]
) -> RoutedText:
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def watch(layer: int, experts: Tensor, weights: Tensor) -> None:
        seen.setdefault(layer, []).append((experts.cpu(), weights.cpu()))

    with watched_routers(network, watch):
        answer = _answer(network, ids, max_tokens, model.eos_ids)
    experts, weights = (
        torch.stack([torch.cat([pair[part] for pair in passes]) for passes in seen.values()], 1)
        for part in (0, 1)
    )
    if not weights.isfinite().all():
        raise NonFiniteLogitsError("routing: weights of experts must be finite (got others)")
    whole = ids + answer
    return RoutedText(
        whole,
        len(ids),
        [_shown(model.tokenizer.decode_bytes([i])) for i in whole],
        token_labels(whole, model.tokenizer, names),
        experts.numpy(),
        weights.numpy(),
    )


def _shown(token: bytes) -> str:
    return token.decode("utf-8", errors="backslashreplace")


def _answer(
    network: KimiModel, ids: list[int], max_tokens: int, eos_ids: Collection[int]
) -> list[int]:
    """Computes the prompt and at most max_tokens after it, the last one too; returns those."""
    cache = LatentCache(
        network.config,
        max_tokens=len(ids) + max_tokens,
        dtype=network.dtype,
        device=network.model.embed_tokens.weight.device,
    )
    seq, greedy = cache.new_sequence(), SamplingParams(temperature=0)
    logits = network.prefill(torch.tensor(ids, dtype=torch.int64), cache, seq)
    answer: list[int] = []
    for position in range(len(ids), len(ids) + max_tokens):
        chosen = sample(logits.cpu(), greedy, seed=0, position=position).id
        answer.append(chosen)
        logits = network.decode(torch.tensor([chosen]), cache, [seq])[0]
        if chosen in eos_ids:
            break
    return answer


# ---- the seam -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched_routers(network: KimiModel, watch: Watch) -> Iterator[None]:
    """Calls watch(layer, topk_ids, topk_weights) whenever a layer's router has chosen. Recorded steps call nothing.

    topk_ids, topk_weights  [tokens, topk] int32 and float32 of one forward pass, where the model is
    """
    with contextlib.ExitStack() as undo:
        for layer, router in _routers(network):

            def hook(_module: Any, _inputs: Any, chosen: Any, layer: int = layer) -> None:
                watch(layer, *chosen)

            undo.callback(router.register_forward_hook(hook).remove)
        yield


def _routers(network: KimiModel) -> Iterator[tuple[int, torch.nn.Module]]:
    for i, block in enumerate(network.model.layers):
        if isinstance(block.mlp, MoE):
            yield i, block.mlp.gate
