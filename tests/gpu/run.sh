#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the kernels and the tests for this machine's GPU, compares every
# PTX wrapper with its emulated twin, runs the op tests against float64 (each op also replayed as a CUDA graph), and both
# again under compute-sanitizer. Fails on the first thing that does not hold, and on anything that it needs and lacks.
# Last come the benchmarks (docs/benchmarks.md, "On a GPU"), whose rows go to a file; a figure that cannot be taken does
# not keep the next one from being taken.
#
#   tests/gpu/run.sh                  on a machine with a GPU (sm_80 or later)
#   tests/gpu/run.sh --rehearse       without one: the same builds (nvcc is needed), the shim in the GPU's place
#   tests/gpu/run.sh --steps A,B,...  the builds and these steps only: conformance ops portable model memcheck racecheck
#                                     synccheck initcheck bench; also after --rehearse
#
# STEP_SECONDS is what a step may take (default: 1200; a kernel that hangs is stopped then), BENCH_SECONDS what the
# benchmarks may (default: 480), BENCH_ROWS the file of their rows (default: build/gpu/bench.jsonl). PYTHON names the
# interpreter (default: .venv/bin/python if it exists, else python3); it needs torch, numpy, pytest, hypothesis and pybind11.
set -euo pipefail
cd "$(dirname "$0")/../.."
usage() { echo "usage: tests/gpu/run.sh [--rehearse] [--steps ${all// /,}]" >&2; exit 2; }
rehearse=false
all="conformance ops portable model memcheck racecheck synccheck initcheck bench"
steps=" $all "
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) rehearse=true ;;
    --steps) [ $# -gt 1 ] || usage; steps=" ${2//,/ } "; shift ;;
    *) usage ;;
  esac
  shift
done
for name in $steps; do [[ " $all " == *" $name "* ]] || usage; done
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
step() { printf '\n=== %s (%ss)\n' "$1" "$SECONDS"; }
left_out=()
failed=()
# Whether a step is wanted; one that is not is named in the end.
wanted() {
  if [[ $steps == *" $1 "* ]]; then return 0; fi
  left_out+=("$1: not among --steps")
  return 1
}
limited() { timeout --kill-after=10 "${STEP_SECONDS:-1200}" "$@"; }

step "what this machine has"
missing=()
for program in nvcc cmake c++ g++; do command -v $program >/dev/null || missing+=("$program"); done
for module in torch numpy pytest hypothesis pybind11; do
  "$PYTHON" -c "import $module" 2>/dev/null || missing+=("the Python package $module")
done
if ! $rehearse; then
  for program in nvidia-smi $([[ $steps == *check* ]] && echo compute-sanitizer); do command -v $program >/dev/null || missing+=("$program"); done
fi
if [ ${#missing[@]} -gt 0 ]; then
  printf 'run.sh: needs %s\n' "${missing[@]}" >&2
  exit 1
fi
if $rehearse; then
  arch=90
  export KIMI_NATIVE_GPU=rehearsal
  echo "rehearsal: no GPU; building for sm_90a"
else
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
  export KIMI_NATIVE_GPU=required
fi
[ "$arch" -ge 80 ] || { echo "run.sh: the GPU must be sm_80 or later (got sm_$arch)" >&2; exit 1; }
[ "$arch" != 90 ] || arch=90a
export KIMI_NATIVE_GPU_ARCH=$arch
nvcc --version | tail -2

step "the package with its CUDA kernels, for sm_$arch"
build=build/gpu
ninja=$(command -v ninja || true)
cmake -S . -B $build ${ninja:+-G Ninja} -DCMAKE_BUILD_TYPE=Release -DKN_CUDA=ON -DKN_CUDA_BENCH=ON \
  -DKN_CUDA_ARCHS="$arch" \
  -DPython_EXECUTABLE="$(command -v "$PYTHON")" -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" >/dev/null
cmake --build $build --parallel "$(nproc)" >$build/build.log || { tail -40 $build/build.log; exit 1; }
mkdir -p $build/python
cp -r python/kimi_native $build/python/
cp $build/_native*.so $build/libkn_cuda.so $build/python/kimi_native/
export PYTHONPATH=$PWD/$build/python KIMI_NATIVE_GPU_LIBRARIES=$PWD/$build

if [[ "$steps" == " bench " ]]; then left_out+=("the tests: not among --steps"); else

step "the conformance programs"
wrappers=(tests/gpu/conformance/gpu_driver.cu tests/gpu/conformance/wrappers.cu csrc/cuda/tensor_map.cu csrc/cuda/errors.cu)
if [ "$arch" = 90a ]; then
  wrappers+=(tests/gpu/conformance/wrappers_sm90.cu)
else
  left_out+=("conformance of the Hopper wrappers: this GPU is sm_$arch")
fi
nvcc -std=c++20 -O3 -fmad=false --expt-relaxed-constexpr -cudart static -shared -Xcompiler=-fPIC --threads 4 \
  -gencode "arch=compute_$arch,code=sm_$arch" -Icsrc -Icsrc/include -Itests/gpu/conformance "${wrappers[@]}" \
  -o $build/libkn_gpu_tests.so

tests=(tests/gpu/test_conformance.py tests/simt/test_cuda_*.py)
# An error of the device stays with its process: the first one ends it. Where a test hangs is printed after a minute.
pytest=("$PYTHON" -P -m pytest -q -x -rs -p no:cacheprovider -o faulthandler_timeout=60)

if wanted conformance; then
  step "conformance: each wrapper here and in the shim, on the same bits"
  limited "${pytest[@]}" tests/gpu/test_conformance.py
fi
if wanted ops; then
  step "the ops against float64; on a GPU, once more as CUDA graphs"
  KIMI_NATIVE_SYNC=0 limited "${pytest[@]}" tests/simt/test_cuda_*.py
fi
if wanted portable; then
  if [ "$arch" = 90a ] && ! $rehearse; then
    step "the same with the kernels of other GPUs"
    KIMI_NATIVE_CUDA_PORTABLE=1 KIMI_NATIVE_SYNC=0 limited "${pytest[@]}" tests/simt/test_cuda_*.py
  else
    left_out+=("portable: these kernels are what $($rehearse && echo "the shim" || echo "this GPU") ran before")
  fi
fi
if wanted model; then
  step "a model on the GPU against the CPU, and its steps as CUDA graphs"
  KIMI_NATIVE_SYNC=0 limited "${pytest[@]}" tests/gpu/test_model.py
fi
for tool in memcheck racecheck synccheck initcheck; do
  wanted $tool || continue
  if $rehearse; then
    left_out+=("$tool: it needs a GPU")
  else
    step "compute-sanitizer, $tool (wrappers and ops, not the model)"
    limited compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 5 "${pytest[@]}" "${tests[@]}"
  fi
done
if $rehearse; then left_out+=("CUDA graphs: they need a GPU"); fi

fi

if wanted bench; then
step "benchmarks"
rows=${BENCH_ROWS:-$build/bench.jsonl}
: >"$rows"
bench_end=$((SECONDS + ${BENCH_SECONDS:-480}))
# Runs a command that prints rows, within what is left of the time; one that fails is named and does not end the run.
bench() {
  local left=$((bench_end - SECONDS))
  if [ $left -lt 10 ]; then
    left_out+=("$*: no time left")
  else
    timeout $left "$@" --json | tee -a "$rows" || failed+=("$* (exit code $?)")
  fi
}
if $rehearse; then
  mapfile -t shim < <("$PYTHON" -P tests/simt/simt_build.py)
  program=${shim[1]}
  peers=("$PYTHON" bench/cuda/peers.py --rehearse "${shim[0]}")
  left_out+=("figures: a rehearsal's times are the shim's")
else
  program=$build/bench/kn_cuda_bench
  peers=("$PYTHON" bench/cuda/peers.py)
  # torch's own cuBLAS gives the ceiling of bf16 products; the loader does not know where it lies.
  site=$("$PYTHON" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')
  KIMI_NATIVE_CUBLAS=${KIMI_NATIVE_CUBLAS:-$(find "$site"/nvidia -name 'libcublas.so.*' 2>/dev/null | head -1 || true)}
  export KIMI_NATIVE_CUBLAS
fi
# A process each, so that an error of the device costs the figures of one. Peers that compile themselves come last.
programs=$("$program" list)
for name in $programs; do bench "$program" "$name"; done
for name in step bf16_gemm moe_experts int4_gemm mla_decode; do bench "${peers[@]}" "$name"; done
"$PYTHON" bench/cuda/table.py "$rows"
echo "$(wc -l <"$rows") rows in $rows"
fi

step "done"
[ ${#left_out[@]} -eq 0 ] || printf 'not run: %s\n' "${left_out[@]}"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
