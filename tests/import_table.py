"""Who may import whom, for test_imports.py. A new module is entered in MODULES: the moment to ask where it belongs."""

from __future__ import annotations

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
        {
            "argument_files",
            "config",
            "folder_names",
            "generate",
            "model_arguments",
            "model_file",
            "routing",
        }
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
        {
            "checkpoint",
            "checkpoint_writer",
            "config",
            "quant.qat",
            "nano.text_rows",
            *NANO_TRAINING,
        },
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
    "nano.plot": ({"nano.train_log", "whole_file"}, {"matplotlib"}),
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
    "bench.rows": ({"argument_files", "bench.load", "bench.native"}, set()),
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
    "bench.peer_kt": ({"errors", "weights", "bench.problem"}, {"torch", "kt_kernel"}),
    "bench.peer_moe": (
        {"ops", "weights", "bench.problem", "bench.peer_int4", "bench.peer_kt"},
        {"torch"},
    ),
    "bench.peer_llama": (
        {"ops", "bench.llama_worker", "bench.turns", "bench.problem", *BENCH},
        set(),
    ),
    "bench.llama_worker": (set(), {"numpy", "llama_cpp"}),
    "bench.peers": (
        {"ops", "checkpoint", "bench.rows", "bench.load", "bench.turns", "bench.problem"}
        | {"bench.peer_llama"}
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
