"""quantization_config of config.json: the two published schemes, checked field by field against what we compute.

A field that is not listed here would change what the stored numbers mean, so it is an error, not a warning.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from kimi_native.errors import ConfigError
from kimi_native.json_file import REQUIRED, Section

TEXT_PREFIXES = ("language_model.",)  # of the text tensors inside a multimodal wrapper
LINEAR_NAMES = frozenset(
    "q_proj q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj lm_head".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class QuantizationConfig:
    """How matrices are stored: kind "int4" (groups of 32 along the input) or "fp8" (blocks of 128 x 128).

    ignore  modules that stay as they are: exact module names, or "re:" and a regular expression that must match
            at the start of the name; names with and without the text prefix of a multimodal wrapper both count
    """

    kind: str
    group_size: int
    ignore: tuple[str, ...] = ()
    _exact: frozenset[str] = field(init=False, repr=False, compare=False)
    _pattern: re.Pattern[str] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        expressions = [i[3:] for i in self.ignore if i.startswith("re:")]
        exact = {i.removeprefix(p) for i in self.ignore for p in ("", *TEXT_PREFIXES)}
        object.__setattr__(self, "_exact", frozenset(exact))
        _check_patterns(self.ignore, "quantization_config.ignore")
        # One match a name instead of one a pattern: a model has 70,000 matrices.
        alternatives = "|".join(f"(?:{e})" for e in expressions)
        object.__setattr__(self, "_pattern", re.compile(alternatives) if expressions else None)

    def is_ignored(self, module_name: str) -> bool:
        """Whether the ignore list names the module (tensor name without its last part)."""
        for prefix in TEXT_PREFIXES:
            if module_name.startswith(prefix):
                return self._matches(module_name) or self._matches(module_name[len(prefix) :])
        return self._matches(module_name)

    def is_quantized(self, module_name: str) -> bool:
        """Whether the module is a matrix that this scheme stores quantized."""
        last = module_name.rpartition(".")[2]
        # The router, embeddings and norms are no Linear; published FP8 keeps lm_head without listing it.
        if last not in LINEAR_NAMES or (self.kind == "fp8" and last == "lm_head"):
            return False
        return not self.is_ignored(module_name)

    def _matches(self, name: str) -> bool:
        if name in self._exact:
            return True
        return self._pattern is not None and self._pattern.match(name) is not None


_PATTERN_TOKEN = re.compile(
    r"\\[dwsDWS]|\\[^0-9A-Za-z]|\[\^?\]?[^\]]*\]|\((?:\?:)?|\)|[*+?]|\||[.^$]|[\w\-/: ]|,"
)
_MAX_PATTERN_CHARS = 256
_MAX_PATTERNS = 32
_MAX_PATTERN_WORK = 1 << 20


def _check_patterns(names: Iterable[str], where: str) -> None:
    """Each "re:" expression by itself: valid, and bounded in matching time (no back-reference, no repeated group)."""
    expressions = [name[3:] for name in names if name.startswith("re:")]
    if len(expressions) > _MAX_PATTERNS:
        raise ConfigError(
            f"{where} must hold at most {_MAX_PATTERNS} patterns (got {len(expressions)})"
        )
    work = 0
    for expression in expressions:
        shown = reprlib.repr(expression)
        if len(expression) > _MAX_PATTERN_CHARS:
            raise ConfigError(
                f"{where}: patterns must be of at most {_MAX_PATTERN_CHARS} characters (got {shown})"
            )
        work += _pattern_work(expression, where)
        if work > _MAX_PATTERN_WORK:
            raise ConfigError(f"{where}: patterns must be cheaper to match (got {shown})")
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as e:
            raise ConfigError(
                f"{where}: patterns must be regular expressions (got {shown}: {e})"
            ) from None


def _pattern_work(expression: str, where: str) -> int:
    """Upper bound of backtracking steps on a 64-character name: each * or + tries 64 lengths, each | or ? two ways."""
    work, position, nothing_to_repeat = 1, 0, True
    expression = expression.removesuffix(
        ".*"
    )  # matching is not anchored at the end: this always succeeds
    while position < len(expression):
        token = _PATTERN_TOKEN.match(expression, position)
        if token is None or (nothing_to_repeat and token[0] in "*+?"):
            raise ConfigError(
                f"{where}: patterns may use letters, classes, groups, | and the quantifiers "
                f"* + ? on single characters (got {reprlib.repr(expression)})"
            )
        work *= {"*": 64, "+": 64, "?": 2, "|": 2}.get(token[0], 1)
        nothing_to_repeat = token[0][0] in "()"
        position = token.end()
    return work


def read_quantization(section: Section) -> QuantizationConfig:
    method = section.choice("quant_method", ("compressed-tensors", "fp8"))
    return _read_fp8(section) if method == "fp8" else _read_compressed_tensors(section)


def _names(section: Section, key: str) -> tuple[str, ...]:
    value = section.get(key)
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise section.fail(key, "a list of module names")
    _check_patterns(value, f"{section.source}: {section.path}{key}")
    return tuple(value)


def _read_fp8(section: Section) -> QuantizationConfig:
    section.choice("fmt", ("e4m3",), "e4m3")
    section.choice("activation_scheme", ("dynamic",))
    block = section.get("weight_block_size", REQUIRED)
    if not isinstance(block, (list, tuple)) or list(block) != [128, 128]:
        raise section.fail("weight_block_size", "[128, 128]")
    # A bare last component ("lm_head", "gate") stands for every module of that name.
    names = _names(section, "modules_to_not_convert")
    ignore = names + tuple(rf"re:.*\.{re.escape(n)}$" for n in names if n in LINEAR_NAMES)
    section.finish(
        {
            "dequantize": (False,),
            "expert_dtype": ("fp8", None),
            "modules_to_convert": (None,),
            "scale_fmt": ("float", "ue8m0", None),  # of activations, which we do not quantize
        }
    )
    return QuantizationConfig("fp8", 128, ignore)


def _read_compressed_tensors(section: Section) -> QuantizationConfig:
    section.choice("format", ("pack-quantized",))
    section.choice("quantization_status", ("compressed",), "compressed")
    section.choice("kv_cache_scheme", (None,), None)
    ignore = _names(section, "ignore")
    groups = section.section("config_groups")
    if groups is None or len(groups.values) != 1:
        raise section.fail("config_groups", "an object with one group")
    group = groups.section(next(iter(groups.values)))
    if group is None:
        raise section.fail("config_groups", "an object with one group")
    _check_group(group)
    section.finish(
        {
            "sparsity_config": ({}, None),
            "transform_config": ({}, None),
            "moe_sparsity_config": ({}, None),
        },
        frozenset({"global_compression_ratio", "version"}),
    )
    return QuantizationConfig("int4", 32, ignore)


def _check_group(group: Section) -> None:
    """INT4 weights in groups of 32 of every Linear, and nothing else."""
    if list(_names(group, "targets")) != ["Linear"]:
        raise group.fail("targets", '["Linear"]')
    weights = group.section("weights")
    if weights is None:
        raise group.fail("weights", "an object")
    weights.choice("num_bits", (4,))
    weights.choice("type", ("int",))
    weights.choice("symmetric", (True,))
    weights.choice("strategy", ("group",))
    weights.choice("group_size", (32,))
    weights.finish(
        {
            "actorder": (None,),
            "block_structure": (None,),
            "dynamic": (False,),
            "scale_dtype": (None, "bfloat16", "torch.bfloat16"),
            "zp_dtype": (None,),
        },
        frozenset({"observer", "observer_kwargs"}),  # how the scales were found
    )
    group.finish(
        {
            "input_activations": (None,),
            "output_activations": (None,),
            "format": (None, "pack-quantized"),
        }
    )
