"""Builds the shim with every kernel and the test programs into one shared library, by plain compiler calls.

Not part of the package's build. Objects are cached in build/simt by the hash of everything that may enter them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INCLUDES = ["csrc", "csrc/include", "tests/gpu/conformance"]
SOURCES = [
    "csrc/simt/*.cpp",
    "csrc/cuda/*.cu",
    "tests/gpu/conformance/wrappers*.cu",
    "tests/simt/planted*.cu",
    "tests/simt/driver.cpp",
]
HEADERS = ["csrc/**/*.h", "csrc/**/*.cuh", "tests/gpu/conformance/*.h"]
BENCH_SOURCES = ["bench/cuda/*.cpp", "bench/cuda/*.cu", "bench/options.cpp"]
FOLDER = ROOT / "build" / "simt"
ON_GPU_ALONE = {"gpu.cpp", "cublas.cpp"}  # rehearsal.cpp stands in for these
BENCH_HEADERS = ["bench/*.h", "bench/cuda/*.h"]
# A misaligned access through a typed pointer traps; the shim turns the trap into a report.
TRAPS = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


@contextmanager
def one_builder() -> Iterator[None]:
    """Of several test processes one compiles; the others wait and find its objects."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def files(patterns: list[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def processor_flags() -> list[str]:
    """Vectors and fused multiply-add where this machine has them: the emulation is three times as fast."""
    try:
        features = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return []
    return ["-march=x86-64-v3"] if {"avx2", "fma", "bmi2", "movbe"} <= set(features) else []


def flags(source: Path, sanitize: str, defines: tuple[str, ...]) -> list[str]:
    result = ["-std=c++20", "-O2", "-g1", "-fPIC", "-ffp-contract=off", *WARNINGS]
    result += [*processor_flags(), *(f"-I{ROOT / include}" for include in INCLUDES)]
    result += [f"-D{define}" for define in defines]
    if sanitize:
        result += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    if source.suffix == ".cu":
        result += TRAPS
    return result + (["-x", "c++"] if source.suffix == ".cu" else [])


def compile_object(source: Path, headers: bytes, options: list[str]) -> Path:
    key = hashlib.sha256(
        headers + source.read_bytes() + repr((str(source), options)).encode()
    ).hexdigest()
    out = FOLDER / f"{source.stem}.{key[:24]}.o"
    if not out.exists():
        unfinished = out.with_suffix(f".{os.getpid()}")
        command = [compiler(), *options, "-c", str(source), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.relative_to(ROOT)} does not compile:\n{done.stderr}")
        unfinished.rename(out)
    return out


@one_builder()
def build_bench(library: Path, *others: Path) -> Path:
    """The GPU's benchmark program against the shim `library`, compiled if it has to be. What the sources `others`
    define takes the place of what the library does."""
    headers = b"".join(path.read_bytes() for path in files(HEADERS + BENCH_HEADERS))
    sources = [path for path in files(BENCH_SOURCES) if path.name not in ON_GPU_ALONE]
    sources += others
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda s: compile_object(s, headers, flags(s, "", ())), sources))
    key = hashlib.sha256(repr((str(library), sorted(map(str, objects)))).encode()).hexdigest()
    program = FOLDER / f"kn_cuda_bench.{key[:24]}"
    if not program.exists():
        unfinished = program.with_suffix(f".{os.getpid()}")
        command = [compiler(), "-pthread", *map(str, objects), str(library)]
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        unfinished.rename(program)
    return program


@one_builder()
def build(sanitize: str = "", defines: tuple[str, ...] = ()) -> Path:
    """The shared library, compiled if it has to be; `sanitize` is a list for -fsanitize, `defines` macros to set."""
    headers = b"".join(path.read_bytes() for path in files(HEADERS))
    sources = files(SOURCES)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(
            pool.map(lambda s: compile_object(s, headers, flags(s, sanitize, defines)), sources)
        )
    key = hashlib.sha256(repr(sorted(map(str, objects))).encode()).hexdigest()
    library = FOLDER / f"libkn_simt.{key[:24]}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        sanitizers = [f"-fsanitize={sanitize}"] if sanitize else []
        command = [compiler(), "-shared", "-pthread", *sanitizers, *map(str, objects)]
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        unfinished.rename(library)
    return library


if __name__ == "__main__":  # for tests/gpu/run.sh
    shim = build()
    print(shim, build_bench(shim), sep="\n")
