"""The doctor: its view of the machine from a made-up root, and whether its self-check notices anything."""

from __future__ import annotations

import json

import pytest
import torch

from kimi_native import doctor, machine, ops


def write(root, files: dict[str, str]):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# ---- self-check -----------------------------------------------------------------------------------------------------


def test_self_check_covers_every_op():
    assert sorted(doctor._CASES) == sorted(ops.__all__)


def test_self_check_passes_here():
    assert [check for check in doctor.self_check() if not check["ok"]] == []


@pytest.mark.parametrize("name", ops.__all__)
def test_self_check_notices_a_result_that_is_slightly_off(monkeypatch, name):
    """The reference stands in for the kernel, one value changed: by 1, or by 1 % of the largest."""
    honest = getattr(ops, name)

    def kernel(*args, **kwargs):
        native = ops.active_backend() == "native"
        with ops.backend("reference"):
            result = honest(*args, **kwargs)
        if native:
            value = result[0] if isinstance(result, tuple) else result
            value = getattr(value, "token_index", getattr(value, "weight_packed", value))
            step = 0.01 * value.abs().max() if value.is_floating_point() else 1
            value.view(-1)[-1] += step
        return result

    monkeypatch.setattr(ops, name, kernel)
    check = doctor._check_op(ops, name)
    assert check == {"op": name, "ok": False, "result": "failed: differs from the reference"}


@pytest.mark.parametrize("name", ops.__all__)
def test_self_check_refuses_nan_and_wrong_shapes(monkeypatch, name):
    """An empty or NaN result must not pass as close to anything."""
    honest = doctor._CASES[name]

    def spoiled(how):
        def case(module, generator):
            native = module.active_backend() == "native"
            with module.backend("reference"):
                results = honest(module, generator)
            return tuple(how(r) for r in results) if native else results

        return case

    monkeypatch.setitem(doctor._CASES, name, spoiled(lambda r: r[:0]))
    assert not doctor._check_op(ops, name)["ok"]
    if name != "moe_dispatch":
        nan = spoiled(lambda r: torch.full_like(r, torch.nan) if r.is_floating_point() else r)
        monkeypatch.setitem(doctor._CASES, name, nan)
        assert not doctor._check_op(ops, name)["ok"]


def test_self_check_reports_an_op_that_raises_and_one_without_a_check(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("swiglu: not written yet")

    monkeypatch.setattr(ops, "swiglu", broken)
    monkeypatch.setattr(ops, "__all__", ["swiglu", "new_op"])
    assert doctor.self_check() == [
        {"op": "swiglu", "ok": False, "result": "failed: swiglu: not written yet"},
        {"op": "new_op", "ok": False, "result": "failed: the doctor has no check for it"},
    ]


# ---- the report -----------------------------------------------------------------------------------------------------


def test_examine_reports_this_machine(monkeypatch):
    monkeypatch.setattr(doctor, "QUICK_BYTES", 1 << 20)
    report = doctor.examine(quick=True)
    assert json.loads(json.dumps(report)) == report
    assert report["kernels"]["isa"] == ops.active_isa()
    assert report["kernels"]["threads"] == ops.num_threads()
    assert report["memory"]["total_bytes"] >= report["memory"]["available_bytes"] > 0
    assert report["memory"]["read_bandwidth"]["one_thread_gb_per_s"] > 0
    assert report["cuda"]["architectures"] == ops.cuda_library()["architectures"]
    if not report["cuda"]["architectures"]:
        assert report["cuda"]["kernels"] == "this build has no CUDA kernels"
    elif report["cuda"]["driver"] is None and report["cuda"]["driver_library"] is None:
        assert report["cuda"]["kernels"] == "cuda: no NVIDIA driver was found"
    assert [c["op"] for c in report["self_check"]] == ops.__all__
    assert report["ok"] == all(c["ok"] for c in report["self_check"])


def test_examine_survives_a_machine_that_says_nothing(monkeypatch, tmp_path):
    def unavailable():
        raise RuntimeError("cpu: KIMI_NATIVE_CPU_ISA=amx is not available here")

    monkeypatch.setattr(doctor, "QUICK_BYTES", 1 << 20)
    monkeypatch.setattr(ops, "active_isa", unavailable)
    report = doctor.examine(quick=True, root=tmp_path)
    assert report["ok"] is False
    assert report["self_check"] == []
    assert "KIMI_NATIVE_CPU_ISA=amx" in report["kernels"]["error"]
    assert report["memory"]["total_bytes"] is None
    assert report["cpu"]["cores_cgroup_quota"] is None
    assert report["cuda"]["gpus"] == []


def test_examine_reads_cgroup_v2(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/memory.max": "4096\n",
            "sys/fs/cgroup/memory.max": "8192\n",
        },
    )
    assert machine.cpu_quota(root) == 1.5
    assert machine.memory_limit(root) == 4096


def test_examine_reads_cgroup_v1(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1048576\n",
        },
    )
    assert machine.cpu_quota(root) == 0.5
    assert machine.memory_limit(root) == 1048576


def test_examine_reads_huge_pages_and_nvidia(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/driver/nvidia/version": "NVRM version: 580.1\nGCC version: 12\n",
            "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t NVIDIA H200\nIRQ: 1\n",
        },
    )
    cuda = doctor._cuda(root)
    assert (cuda["driver"], cuda["gpus"]) == ("NVRM version: 580.1", ["NVIDIA H200"])
    assert doctor._chosen("always [madvise] never\n") == "madvise"
    assert doctor._chosen(None) is None
