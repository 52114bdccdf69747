"""The house's walls as a test: who may import whom, what no module may do, where intrinsics and asm may stand.

The table is in import_table.py.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from import_table import MODULES, TORCH_FREE

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "kimi_native"

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
    r"csrc/cuda/ptx\w*\.cuh|csrc/cpu/simd/\w+\.h|csrc/core/cpu_features\.cpp|csrc/simt/fiber\.cpp"
    r"|bench/peak_loops\.cpp"
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
