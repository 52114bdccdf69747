"""The house's walls as a test: who may import whom, what no module may do, where intrinsics and asm may stand.

A new module has to be entered in MODULES, which is the moment to ask where it belongs.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "kimi_native"

# module: (modules of this package it may import, packages outside the standard library). `errors` is open to all.
TOOLS = {"chat.tool", "chat.function_schema", "chat.arguments", "chat.docstrings"}
CHAT = {"chat.types", "chat.template", "chat.parser", "chat.typescript", "chat.call_ids", *TOOLS}
CHAT |= {"chat.jinja_template", "chat.masking", "chat.sandbox", "chat.template_source"}
QUANT = {"quant.int4", "quant.int8", "quant.fp8", "quant.modules"}
FORMATS = {"quant.groups", "checks", "weights"}
FILES = {"safetensors_file", "tensor_table", "json_file", "model_file", "mapped_file", "gc_pause"}
PTQ = {"quant.ptq_plan", "quant.ptq_tensors", "quant.ptq_state"}
WRITING = {"checkpoint_writer", "folder_names", "progress_bar"}
TALK = {"conversation", "tool_runner", "transcript"}
RUN = {
    "machine_settings",
    "engine",
    "prefixes",
    "guide",
    "schema_grammar",
    "generation",
    "model",
    "recorded",
    "placement",
    "network",
    "cache",
    "loader",
    "ops",
}
BENCH = {"bench.native", "bench.rows", "bench.load", "bench.loading", "bench.e2e"}
NANO_TRAINING = {"nano.dataset"} | {
    f"nano.{name}"
    for name in "balance batches divergence graph muon published settings train_log train_state".split()  # noqa: SIM905
}
MODULES: dict[str, tuple[set[str], set[str]]] = {
    # commands
    "__init__": ({"generate", "generation", "sampling", "chat.types", "chat.tool", *TALK}, set()),
    "__main__": ({"cli"}, set()),
    "terminal": ({"units"}, {"rich"}),
    "streams": (set(), set()),
    "units": (set(), set()),
    "machine": (set(), set()),
    "machine_settings": ({"ops"}, {"torch"}),
    "cli": (
        {"__init__", "generate", "generation", "sampling", "tokenizer", "config", *CHAT}
        | {"checkpoint", "plan", "doctor", "make_checkpoint", "presets"}
        | {"quant.ptq", "bench.command", "chat_cli", "progress_bar", "terminal", "units"}
        | {"quant.quantization_error"}
        | {"model_arguments", "qat_cli", "routing_cli", "streams"}
        | {"claims.command", "nano.demo"},
        {"rich", "torch"},
    ),
    "qat_cli": (
        {"checkpoint", "checkpoint_writer", "machine", "model_file", "units"}
        | {"nano", "nano.train", "nano.settings", "quant.export"},
        set(),
    ),
    "chat_cli": (
        {
            "argument_files",
            "chat",
            "tokenizer",
            "config",
            "model_file",
            "terminal",
            "model_arguments",
            "terminal_chat",
            *CHAT,
        },
        set(),
    ),
    "model_arguments": ({"generate", "sampling", "progress_bar", "terminal"}, {"torch"}),
    "terminal_chat": (
        {"generate", "guide", "model_arguments", "tool_file", "chat_input", "chat_output"}
        | {*TALK, *CHAT},
        set(),
    ),
    "chat_input": (set(), set()),
    "chat_output": ({"generation", "terminal", *TALK, *CHAT}, {"rich"}),
    "tool_file": (CHAT, set()),
    "argument_files": (set(), set()),
    # which experts tokens choose
    "routing_cli": (
        {"argument_files", "config", "generate", "model_arguments", "model_file", "routing"}
        | {"routing_page", "routing_plot", "routing_report", "routing_rows", "terminal"}
        | {"whole_file"},
        set(),
    ),
    "routing_rows": ({"argument_files", "chat.template", "chat.types", "generate"}, set()),
    "routing_report": ({"routing", "routing_statistics"}, set()),
    "routing_page": ({"routing", "routing_report", "routing_statistics"}, {"numpy"}),
    "routing_plot": ({"routing_statistics"}, {"matplotlib", "numpy"}),
    "routing": (
        {"cache", "config", "generate", "model", "prompts", "routing_statistics", "sampling"}
        | {"token_roles"},
        {"torch", "numpy"},
    ),
    "routing_statistics": (set(), {"numpy"}),
    "token_roles": ({"chat.template", "tokenizer"}, set()),
    "whole_file": (set(), set()),
    "doctor": ({"__init__", "ops", "machine"}, {"torch", "numpy"}),
    # text and events
    "generate": (
        {
            "asynchronous",
            "prompts",
            "checkpoint",
            "config",
            "load_counts",
            "folder_names",
            "model_file",
            "plan",
            "sampling",
            "tokenizer",
            "progress_bar",
            *CHAT,
            *RUN,
            *TALK,
        },
        {"torch"},
    ),
    "generation": (
        {"config", "engine", "guide", "prefixes", "sampling", "tokenizer", *CHAT},
        set(),
    ),
    "asynchronous": (set(), set()),
    "load_counts": (set(), set()),
    "prompts": ({"config", "tokenizer", *CHAT}, set()),
    "conversation": (
        {"asynchronous", "generation", "guide", "tool_runner", "transcript", *CHAT},
        set(),
    ),
    "tool_runner": (CHAT, set()),
    "transcript": (CHAT, set()),
    "guide": ({"schema_grammar", "tokenizer", *CHAT}, {"numpy"}),
    "schema_grammar": ({"tokenizer", *CHAT}, {"llguidance", "numpy"}),
    "tokenizer": ({"tokenizer_formats", "model_file"}, {"tiktoken", "tokenizers"}),
    "tokenizer_formats": ({"model_file"}, {"tiktoken", "tokenizers"}),
    "chat": (CHAT, set()),
    "chat.types": (set(), set()),
    "chat.tool": (TOOLS, set()),
    "chat.arguments": ({"chat.function_schema"}, set()),
    "chat.function_schema": ({"chat.docstrings"}, set()),
    "chat.docstrings": (set(), set()),
    "chat.typescript": (set(), set()),
    "chat.template": (
        {"chat.types", "chat.tool", "chat.typescript", "tokenizer", "config"}
        | {"chat.template_source"},
        set(),
    ),
    "chat.template_source": ({"json_file", "model_file"}, set()),
    "chat.jinja_template": (
        {"chat.types", "chat.tool", "chat.masking", "chat.sandbox", "tokenizer"}
        | {"chat.template_source"},
        set(),
    ),
    "chat.masking": (set(), set()),
    "chat.sandbox": (set(), set()),
    "chat.sandbox_worker": (set(), {"jinja2"}),  # a program of its own, run by its path
    "chat.call_ids": ({"chat.tool", "tokenizer"}, set()),
    "chat.parser": (
        {"chat.types", "chat.template", "chat.tool", "chat.call_ids", "tokenizer"},
        set(),
    ),
    # ids in, ids out
    "engine": (
        {"model", "cache", "config", "device_memory", "device_sampling", "sampling", "prefixes"},
        {"torch", "numpy"},
    ),
    "prefixes": ({"cache"}, set()),
    "sampling": (set(), {"torch", "numpy"}),
    "device_sampling": ({"checks", "ops", "sampling"}, {"torch", "numpy"}),
    "model": ({"ops", "attention", "cache", "config", "step"}, {"torch"}),
    "step": ({"cache", "mla_schedule", "ops"}, {"torch"}),
    "mla_schedule": ({"checks", "contents", "native"}, {"torch"}),
    "attention": (set(), {"torch"}),
    "single_threads": (set(), {"torch"}),
    "recorded": ({"model", "ops", "cache", "config", "device_memory", "placement"}, {"torch"}),
    "network": (
        {"checkpoint", "loader", "placement", "recorded", "cache", "fp8_rows"},
        set(),
    ),
    "placement": (
        {"model", "ops", "weights", "units", "quant.modules", "quant.tiles"},
        {"torch"},
    ),
    "cache": ({"config", "fp8_rows", "huge_pages"}, {"torch"}),
    # files
    "config": (
        {"config_keys", "quantization", "json_file", "model_file", "folder_names"},
        set(),
    ),
    "config_keys": ({"quantization", "json_file"}, set()),
    "generation_config": ({"config", "config_keys", "json_file", "model_file", "sampling"}, set()),
    "quantization": ({"json_file"}, set()),
    "json_file": (set(), set()),
    "model_file": (set(), set()),
    "gc_pause": (set(), set()),
    "mapped_file": ({"_native"}, {"numpy"}),
    "read_ahead": ({"mapped_file"}, set()),
    "huge_pages": (set(), {"torch"}),
    "safetensors_file": ({"json_file", "mapped_file"}, {"torch", "numpy"}),
    "tensor_table": ({"config", "quantization", "safetensors_file"}, set()),
    "folder_names": (set(), set()),
    "checkpoint": (
        {"config", "generation_config", "quantization", "folder_names", *FILES},
        {"torch"},
    ),
    "plan": (
        {"checkpoint", "config", "quantization", "cache", "machine", "units", *FILES}
        | {"huge_pages", "fp8_rows"},
        {"torch"},
    ),
    "loader": (
        {"model", "config", "checkpoint", "plan", "weights", "read_ahead", "progress_bar"}
        | {"huge_pages"}
        | {*QUANT, *FILES},
        {"torch"},
    ),
    # making checkpoints
    "make_checkpoint": (
        {"config", "presets", "random_tensors", "tokenizer_files", "units", *WRITING},
        {"numpy"},
    ),
    "checkpoint_writer": ({"folder_names"}, {"numpy"}),
    "progress_bar": (set(), {"rich"}),
    "presets": ({"config"}, set()),
    "random_tensors": ({"presets", "checkpoint_writer", *QUANT}, {"torch", "numpy"}),
    "tokenizer_files": ({"byte_pairs", "presets"}, set()),
    "byte_pairs": (set(), set()),
    "quant": (set(), set()),
    "quant.groups": (FORMATS, {"torch"}),
    "quant.int4": (FORMATS, {"torch"}),
    "quant.int8": ({"single_threads", *FORMATS}, {"torch"}),
    "quant.fp8": (FORMATS, {"torch"}),
    "quant.tiles": ({"ops", "weights"}, {"torch"}),
    "quant.modules": ({"ops", "weights", "quant.int8"}, {"torch"}),
    # one checkpoint into another
    "quant.ptq": (
        {"__init__", "checkpoint", "checkpoint_writer", "folder_names", "model_file", *PTQ},
        {"torch"},
    ),
    "quant.ptq_plan": (
        {"checkpoint", "config", "presets", "checkpoint_writer", "folder_names", *FILES}
        | {"config_keys", "quant.ptq_tensors"},
        set(),
    ),
    "quant.ptq_tensors": (
        {"checkpoint_writer", "weights", "quant.groups", *FILES, *QUANT},
        {"torch", "numpy"},
    ),
    "quant.quantization_error": (
        {"checkpoint", "safetensors_file", "tensor_table", "quant.ptq_tensors"}
        | {"quant.fp8", "quant.int4", *FORMATS},
        {"torch"},
    ),
    "quant.ptq_state": ({"checkpoint_writer", "folder_names", "json_file"}, set()),
    # the bundled model: its data knows no torch
    "claims": (set(), set()),
    "claims.command": (
        {"model_arguments", "terminal", "units", "generate", "folder_names", "nano.evaluate"}
        | {"nano.player", "claims"}
        | {
            f"claims.{name}" for name in ("int4", "interleaved", "kept_rows", "pictures", "routing")
        },
        set(),
    ),
    "claims.interleaved": (
        {"claims.kept_rows", "nano.episode", "nano.evaluate", "nano.modes", "nano.world"},
        set(),
    ),
    "claims.kept_rows": (set(), set()),
    "claims.int4": (
        {"checkpoint", "config", "folder_names", "generate", "claims.training"}
        | {"nano.batches", "nano.evaluate", "nano.graph", "nano.player", "nano.published"}
        | {"nano.settings", "nano.train", "nano.world", "quant.calibrate", "quant.export"},
        {"torch"},
    ),
    "claims.routing": (
        {"presets", "routing", "generate", "quant.export", "claims.training"}
        | {"nano.graph", "nano.settings", "nano.train_log"},
        {"torch", "numpy"},
    ),
    "claims.pictures": ({"nano.evaluate", "nano.plot"}, set()),
    "claims.training": (
        {"checkpoint", "nano.batches", "nano.conversations", "nano.graph", "nano.problems"}
        | {"nano.settings", "nano.trainer", "nano.transcripts", "nano.vocabulary"}
        | {"folder_names", "nano.train"},
        set(),
    ),
    "nano": (set(), set()),
    "nano.demo": (
        {"chat.types", "conversation", "generate", "model_arguments", "terminal", "tool_runner"}
        | {"nano.dice", "nano.episode", "nano.problems", "nano.texts", "nano.world"},
        set(),
    ),
    "nano.drills": (
        {"chat.types", "nano.dice", "nano.problems", "nano.texts", "nano.world"},
        set(),
    ),
    "nano.dataset": (set(), set()),
    "nano.toy": ({"nano.dataset"}, set()),
    "nano.text_rows": ({"nano.dataset"}, set()),
    "nano.chat_rows": (
        {"chat.template", "tokenizer", "nano.dataset", "nano.text_rows", "nano.transcripts"},
        set(),
    ),
    # ... and its training: torch, and nothing native
    "nano.batches": ({"nano.dataset", "nano.graph"}, {"torch"}),
    "nano.graph": ({"config", "nano.experts"}, {"torch"}),
    "nano.experts": (set(), {"torch"}),
    "nano.muon": ({"nano.graph"}, {"torch"}),
    "nano.balance": ({"nano.graph"}, {"torch"}),
    "nano.schedule": (set(), set()),
    "nano.settings": ({"nano.batches", "nano.schedule"}, set()),
    "nano.divergence": ({"nano.graph"}, {"torch"}),
    "nano.train_state": (
        {"checkpoint_writer", "json_file", "safetensors_file"},
        {"torch", "numpy"},
    ),
    "nano.train_log": ({"checkpoint_writer"}, set()),
    "nano.trainer": (
        {"checkpoint", "checkpoint_writer", "config", "quant.qat", *NANO_TRAINING},
        {"torch"},
    ),
    "nano.train": (
        {"checkpoint", "folder_names", "json_file", "presets", "tokenizer", "tokenizer_files"}
        | {"quant.export", "nano.trainer", "nano.plot", "nano.text_rows", "nano.toy"}
        | {"chat.template", "config", "nano.chat_rows"}
        | {"nano.dataset", "nano.settings", "nano.train_log", "nano.transcripts"}
        | {"folder_names", "nano.conversations"},
        {"rich"},
    ),
    "nano.plot": ({"nano.train_log"}, {"matplotlib"}),
    "nano.published": (
        {"checkpoint", "weights", "nano.graph", "quant.fp8", "quant.int4"},
        {"torch"},
    ),
    "quant.qat": ({"nano.graph", "quant.groups", "quant.int4", "weights"}, {"torch"}),
    "quant.gptq": ({"quant.int4", *FORMATS}, {"torch"}),
    "quant.calibrate": (
        {"nano.graph", "quant.gptq", "quant.int4", "quant.qat", "weights"},
        {"torch"},
    ),
    "quant.export": (
        {"checkpoint_writer", "config", "folder_names", "presets", "tensor_table"}
        | {"nano.graph", "nano.published", "quant.int4", "quant.qat", "weights"},
        {"torch", "numpy"},
    ),
    "nano.dice": (set(), set()),
    "nano.modes": ({"chat.tool", "chat.types", "nano.problems", "nano.world"}, set()),
    "nano.texts": ({"chat.types", "nano.world"}, set()),
    "nano.planner": ({"chat.types", "nano.problems", "nano.texts", "nano.world"}, set()),
    "nano.expert": (
        {"chat.types", "nano.modes", "nano.planner", "nano.problems", "nano.questions"}
        | {"nano.texts"},
        set(),
    ),
    "nano.questions": ({"chat.types", "nano.dice", "nano.texts", "nano.world"}, set()),
    "nano.episode": (
        {"chat.tool", "chat.types", "nano.modes", "nano.problems", "nano.texts", "nano.world"},
        set(),
    ),
    "nano.evaluate": (
        {"chat.tool", "chat.types", "nano.dice", "nano.episode", "nano.modes"}
        | {"nano.problems", "nano.world"},
        set(),
    ),
    "nano.player": ({"chat.types", "nano.episode", "nano.evaluate", "prefixes"}, set()),
    "nano.small_talk": ({"nano.dice"}, set()),
    "nano.conversations": (
        {"chat.tool", "chat.types", "nano.dice", "nano.expert", "nano.modes", "nano.planner"}
        | {"nano.drills", "nano.problems", "nano.questions", "nano.small_talk", "nano.world"},
        set(),
    ),
    "nano.transcripts": (
        {"chat.template", "tokenizer", "nano.conversations", "nano.dataset", "nano.dice"}
        | {"nano.problems", "nano.texts"},
        set(),
    ),
    "nano.vocabulary": (
        {"byte_pairs", "chat.template", "tokenizer", "tokenizer_files"}
        | {"folder_names", "nano.conversations", "nano.dice", "nano.problems", "nano.small_talk"},
        set(),
    ),
    "nano.problems": ({"nano.dice", "nano.world"}, set()),
    "nano.world": ({"chat.tool", "chat.types", "nano.dice"}, set()),
    # benchmarks: other engines appear here and nowhere else, each import guarded
    "bench": (set(), set()),
    "bench.command": (
        {"ops", "argument_files", "make_checkpoint", "model_arguments", "terminal", *BENCH}
        | {"bench.logits", "bench.peers", "bench.plot"},
        set(),
    ),
    "bench.native": (set(), set()),
    "bench.rows": ({"bench.native"}, set()),
    "bench.load": (set(), set()),
    "bench.loading": ({"bench.load", "checkpoint", "generate", "plan"}, set()),
    "bench.e2e": (
        {"bench.rows", "bench.load", "checkpoint", "sampling", "weights", "plan", "fp8_rows", *RUN},
        {"torch"},
    ),
    "bench.logits": ({"cache", "fp8_rows", "generate"}, {"torch"}),
    "bench.plot": ({"bench.rows"}, {"matplotlib"}),
    "bench.turns": ({"bench.rows"}, set()),
    "bench.problem": ({"ops", "recorded"}, {"torch"}),
    "bench.peer_int4": (
        {"ops", "weights", "bench.problem"},
        {"torch", "numpy", "onnx", "onnxruntime", "openvino"},
    ),
    "bench.peer_dense": ({"ops", "weights", "quant.int8", "bench.problem"}, {"torch"}),
    "bench.peer_mla": ({"ops", "cache", "bench.problem"}, {"torch"}),
    "bench.peer_moe": ({"ops", "weights", "bench.problem", "bench.peer_int4"}, {"torch"}),
    "bench.peer_llama": (
        {"ops", "bench.llama_worker", "bench.turns", "bench.problem", *BENCH},
        set(),
    ),
    "bench.llama_worker": (set(), {"numpy", "llama_cpp"}),
    "bench.peers": (
        {"ops", "bench.rows", "bench.load", "bench.turns", "bench.problem", "bench.peer_llama"}
        | {f"bench.peer_{kind}" for kind in ("int4", "dense", "mla", "moe")},
        {"torch"},
    ),
    # kernels
    "ops": ({"native", "reference", "checks", "weights", "fp8_rows", "mla_schedule"}, {"torch"}),
    "device_memory": (set(), {"torch"}),
    "native": ({"_native", "arena", "checks", "contents", "device_memory"}, {"torch"}),
    "contents": ({"checks"}, {"torch"}),
    "arena": (set(), {"torch", "numpy"}),
    "torch_ops": ({"ops", "weights"}, {"torch"}),
    "reference": ({"fp8_rows"}, {"torch"}),
    "weights": ({"checks"}, {"torch"}),
    "checks": ({"fp8_rows"}, {"torch"}),
    "fp8_rows": (set(), {"torch"}),
    "errors": (set(), set()),
}
NANO_PLAY = {"dice", "world", "problems", "modes", "texts", "planner", "expert", "episode"}
NANO_TEXT = {
    "drills",
    "toy",
    "text_rows",
    "chat_rows",
    "dataset",
    "questions",
    "evaluate",
    "small_talk",
    "conversations",
    "transcripts",
    "vocabulary",
}
NANO_DATA = {f"nano.{name}" for name in NANO_PLAY | NANO_TEXT}
TORCH_FREE = {
    "config",
    "tokenizer",
    "token_roles",
    "errors",
    "presets",
    "chat",
    *CHAT,
    *NANO_DATA,
}  # with all they import

# Nothing that runs code out of a file, or a shell out of a string.
BANNED_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
BANNED_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.hub.load",
    "yaml.load",
    "os.system",
    "os.popen",
    "numpy.load",
    "np.load",
}
MAY_IMPORT_BY_NAME = {"__init__"}  # importlib.import_module, for attributes loaded at first use
MAY_RUN_A_FILE = {"tool_file"}  # the one that the user names with chat --tools


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def python_files() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_names(node: ast.AST) -> list[str]:
    """Dotted names that an import statement brings in; `from a import b` gives a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return []


def own_module(name: str) -> str:
    """kimi_native.chat.types.Message -> chat.types: the longest listed module, else the first part."""
    parts = name.split(".")[1:]
    if not parts or parts[0].startswith("__"):  # kimi_native itself, or its __version__
        return "__init__"
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in {*MODULES, "_native"}:
            return ".".join(parts[:end])
    return parts[0]


def import_violations(module: str, source: str) -> list[str]:
    own, outside = MODULES[module]
    found = []
    for node in ast.walk(ast.parse(source)):
        for name in imported_names(node):
            top = name.split(".")[0]
            if name.startswith("."):
                found.append(f"{module}: relative import of {name}")
            elif top in BANNED_MODULES:
                found.append(f"{module}: import of {top}")
            elif top == "kimi_native":
                if own_module(name) not in own | {"errors"}:
                    found.append(f"{module}: must not import {name}")
            elif top not in sys.stdlib_module_names and top not in outside:
                found.append(f"{module}: must not import {top}")
    return found


def call_violations(module: str, source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in BANNED_CALLS:
            found.append(f"{module}: call of {name}")
        if name.endswith("import_module") and module not in MAY_IMPORT_BY_NAME:
            found.append(f"{module}: call of {name}")
        if name.endswith("exec_module") and module not in MAY_RUN_A_FILE:
            found.append(f"{module}: call of {name}")
        if any(
            k.arg == "shell" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
            for k in node.keywords
        ):
            found.append(f"{module}: call of {name} with shell")
    return found


# ---- Python ---------------------------------------------------------------------------------------------------------


def test_imports_every_module_is_listed():
    missing = set(python_files()) - set(MODULES)
    assert not missing, f"enter these modules in MODULES: {sorted(missing)}"


@pytest.mark.parametrize("module", sorted(python_files()))
def test_imports_follow_the_table(module):
    source = python_files()[module].read_text()
    assert import_violations(module, source) == []
    assert call_violations(module, source) == []


def test_imports_table_has_no_cycle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join([*path, module])}"
        if module in done:
            return
        for other in MODULES[module][0] & set(MODULES):
            if other != module:
                visit(other, (*path, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", sorted(TORCH_FREE))
def test_imports_text_side_does_without_torch(module):
    seen, todo = set(), [module]
    while todo:
        current = todo.pop()
        seen.add(current)
        assert not MODULES[current][1] & {"torch", "numpy"}, f"{module} reaches torch in {current}"
        todo += [m for m in MODULES[current][0] if m not in seen]


def test_imports_few_see_the_native_module():
    """The seam, its base, and the maps that the kernels read."""
    importers = {m for m, (own, _) in MODULES.items() if "_native" in own}
    assert importers == {"native", "mapped_file"}
    assert {m for m, (own, _) in MODULES.items() if "native" in own} == {"mla_schedule", "ops"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model", "from kimi_native.quant.int4 import dequantize"),
        ("model", "from kimi_native import loader"),
        ("model", "import kimi_native.loader"),
        ("model", "from kimi_native._native import cpu"),
        ("model", "from . import ops"),
        ("config", "import torch"),
        ("tokenizer", "def f():\n    import torch.nn"),
        ("reference", "import numpy"),
        ("cli", "from kimi_native import ops, generate"),
        ("sampling", "import pickle"),
        ("checks", "import kimi_native"),
    ],
)
def test_imports_checker_sees_a_forbidden_import(module, source):
    assert len(import_violations(module, source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "torch.load(path)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=flag)",
        "yaml.load(text)",
        "importlib.import_module(name)",
        "spec.loader.exec_module(module)",
    ],
)
def test_imports_checker_sees_a_forbidden_call(source):
    assert len(call_violations("cli", source)) == 1


def test_imports_checker_lets_the_rest_pass():
    source = "import os\nfrom kimi_native.errors import RequestError\nre.compile('x')\nmodel.eval()"
    assert import_violations("config", source) == []
    assert call_violations("config", source + "\nsubprocess.run(['ls'], shell=False)") == []


# ---- C++ ------------------------------------------------------------------------------------------------------------

# First pattern that matches the file's path decides: (path, quoted includes, system includes or None for any standard).
INTRINSICS = r"(immintrin|x86intrin|[a-z]mmintrin|arm_\w+)\.h"
TIER_SYSTEM = r"cstdint|cstring|cmath|" + INTRINSICS
CPP_RULES: list[tuple[str, str, str | None]] = [
    (r"csrc/include/.*", r"kimi_native/.*", None),
    (r"csrc/bindings\.cpp", r"kimi_native/.*", r"pybind11/.*|\w+"),
    (r"csrc/core/threads\.cpp", r"(core|kimi_native)/.*", r"\w+|pthread\.h|sched\.h|immintrin\.h"),
    (
        r"csrc/core/cpu_features\.cpp",
        r"(core|kimi_native)/.*",
        r"\w+|cpuid\.h|sys/syscall\.h|unistd\.h",
    ),
    (r"csrc/core/cuda_library\.cpp", r"(core|kimi_native)/.*", r"dlfcn\.h"),
    (
        r"csrc/core/mapped_files\.cpp",
        r"(core|kimi_native)/.*",
        r"\w+|(signal|sys/mman|unistd)\.h",
    ),
    (r"csrc/core/.*", r"(core|kimi_native)/.*", None),
    (r"csrc/cpu/simd/.*", r"kimi_native/(types|layout)\.h|cpu/simd/.*", TIER_SYSTEM),
    (r"csrc/cpu/\w+_kernel\.h", r"kimi_native/(types|layout)\.h|cpu/\w+\.h", TIER_SYSTEM),
    (r"csrc/cpu/kernels\.cpp", r"cpu/.*", r"cstdint"),
    (r"csrc/cpu/.*", r"(core|cpu|kimi_native)/.*", None),
    (r"csrc/cuda/.*", r"(core|cuda|simt|kimi_native)/.*", r"\w+|cuda\w*\.h"),
    (r"csrc/simt/.*", r"(simt|kimi_native)/.*|cuda/tensor_map\.h", r"[\w/]+(\.h)?"),
    (r"bench/cuda/(gpu|cublas)\.cpp", r"\w+\.h", r"\w+|cuda_runtime\.h|dlfcn\.h"),
    (r"bench/cuda/limits\.cu", r"\w+\.h|cuda/device\.cuh", None),
    (r"bench/cuda/rehearsal\.cpp", r"\w+\.h|simt/options\.h", None),
    (r"bench/cuda/.*", r"(\.\./)?\w+\.h|kimi_native/.*", None),
    (r"bench/.*", r"\w+\.h|kimi_native/.*", r"\w+|sys/(mman|resource|syscall)\.h|unistd\.h"),
]
ANY_STANDARD = r"\w+"  # <vector>, <cmath>: no dot, no folder
# PTX; xgetbv; the switch of stacks; loops of one instruction, which a compiler given intrinsics would pad
MAY_USE_ASM = (
    r"csrc/cuda/ptx\w*\.cuh|csrc/core/cpu_features\.cpp|csrc/simt/fiber\.cpp|bench/peak_loops\.cpp"
)
# A launch, shared memory, a CUDA compiler's own code: kernels reach them through device.cuh, where the shim has twins.
ONLY_IN_DEVICE_CUH = r"<<<|\b__shared__\b"


def cpp_files() -> list[str]:
    suffixes = {".cpp", ".h", ".cu", ".cuh", ".hpp", ".c"}
    return [
        str(path.relative_to(ROOT))
        for folder in ("csrc", "bench")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in suffixes
    ]


def without_comments_and_strings(source: str) -> str:
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(\\.|[^"\\\n])*"', " ", source, flags=re.DOTALL)


def cpp_violations(path: str, source: str) -> list[str]:
    rule = next((r for r in CPP_RULES if re.fullmatch(r[0], path)), None)
    if rule is None:
        return [f"{path}: enter this place in CPP_RULES"]
    _, quoted, system = rule
    found = []
    for opening, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', source, re.MULTILINE):
        allowed = quoted if opening == '"' else system or ANY_STANDARD
        if not re.fullmatch(allowed, name):
            found.append(f"{path}: must not include {name}")
    code = without_comments_and_strings(source)
    if re.search(r"\b(asm|__asm__|__asm)\b", code) and not re.fullmatch(MAY_USE_ASM, path):
        found.append(f"{path}: asm")
    if re.search(ONLY_IN_DEVICE_CUH, code) and path != "csrc/cuda/device.cuh":
        found.append(f"{path}: a launch or shared memory past cuda/device.cuh")
    tier_code = re.fullmatch(r"csrc/cpu/(simd/.*|\w+_kernel\.h)", path)
    if re.search(r"\b_mm\d*_\w+|\b__m\d+i?d?\b", code) and not (
        tier_code or path == "csrc/core/threads.cpp"
    ):
        found.append(f"{path}: intrinsics")
    return found


@pytest.mark.parametrize("path", cpp_files())
def test_imports_of_cpp_follow_the_table(path):
    assert cpp_violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("csrc/cpu/rms_norm.cpp", "#include <immintrin.h>"),
        ("csrc/cpu/rms_norm.cpp", "#include <torch/extension.h>"),
        ("csrc/cpu/rms_norm.cpp", '#include "cuda/ptx.cuh"'),
        ("csrc/cpu/rms_norm.cpp", "auto x = _mm512_setzero_ps();"),
        ("csrc/cpu/rms_norm.cpp", 'asm volatile("nop");'),
        ("csrc/cpu/rms_norm_kernel.h", "#include <vector>"),
        ("csrc/cpu/rms_norm_kernel.h", '#include "core/error.h"'),
        ("csrc/core/error.h", "#include <pybind11/pybind11.h>"),
        ("csrc/core/error.h", '#include "cpu/dispatch.h"'),
        ("csrc/cuda/rms_norm.cu", '#include "cpu/dispatch.h"'),
        ("csrc/cuda/rms_norm.cu", 'asm("mma.sync");'),
        ("csrc/cuda/rms_norm.cu", "kernel<<<1, 32>>>();"),
        ("csrc/cuda/rms_norm.cu", "__shared__ float x[32];"),
        ("csrc/simt/warp.h", '#include "cuda/ptx.cuh"'),
        ("csrc/bindings.cpp", '#include "core/error.h"'),
        ("csrc/include/kimi_native/ops.h", "#include <torch/torch.h>"),
        ("bench/limits.cpp", '#include "core/threads.h"'),
        ("csrc/new/thing.h", ""),
    ],
)
def test_imports_checker_sees_a_forbidden_include(path, source):
    assert len(cpp_violations(path, source)) == 1


# ---- size -----------------------------------------------------------------------------------------------------------

MAX_LINES = 500
LONGER = {
    "python/kimi_native/ops.py": 686
}  # fourteen ops, most of it docstrings and argument lists


def test_imports_files_stay_short():
    files = [*cpp_files(), *(str(p.relative_to(ROOT)) for p in python_files().values())]
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in files}
    long = {path: n for path, n in lines.items() if n > LONGER.get(path, MAX_LINES)}
    assert not long, f"split these files (lines): {long}"
