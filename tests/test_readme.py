"""The README is true: its Python runs, its commands exist, and what it says they print is what they print."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from kimi_native import cli
from kimi_native.make_checkpoint import make_checkpoint

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def in_folder_with_tiny_k2(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "tiny-k2")
    make_checkpoint(tmp_path / "tiny-bf16", format="bf16")
    monkeypatch.chdir(tmp_path)


def console() -> list[tuple[str, str]]:
    """(command, output) of the console blocks"""
    found = []
    for block in blocks("console"):
        parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
        found += zip(parts[1::2], parts[2::2], strict=True)
    return found


def masked(output: str) -> str:
    """Without what depends on the machine: seconds, speeds, and the memory that is free."""
    output = re.sub(r"\d+\.\d s(, \S+ GB/s)?\n", "# s\n", output)
    return re.sub(r"(available +)\S+ \S+", r"\1#", output)


def same_json(actual: str, expected: str) -> bool:
    """Equal keys at every level; values of the computation depend on the CPU's instruction set."""

    def keys(value):
        return {k: keys(v) for k, v in value.items()} if isinstance(value, dict) else type(value)

    return keys(json.loads(actual)) == keys(json.loads(expected))


def test_readme_has_what_these_tests_read():
    assert len(blocks("python")) == 2
    assert len(blocks("sh")) == 2
    assert [c.split()[1] for c, _ in console()] == [
        *("make-checkpoint", "generate", "generate", "inspect", "plan"),
        *("make-checkpoint", "quantize"),
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_readme_python_runs(in_folder_with_tiny_k2, capsys, code):
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed
    if "model.stream" in code:
        assert re.search(r"Finish\(reason='(length|stop)'", printed)


@pytest.mark.parametrize(("command", "expected"), console(), ids=[c for c, _ in console()])
def test_readme_command_prints_what_it_says(in_folder_with_tiny_k2, capsys, command, expected):
    program, *argv = shlex.split(command)
    assert program == "kimi-native"
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    if "--json" in argv:
        assert same_json(out, expected)
    elif argv[0] == "generate":  # the words depend on the CPU's instruction set
        assert out.count("\n") == expected.count("\n") == 1
    else:
        assert masked(out) == masked(expected)


def test_readme_doctor_has_the_rows_it_shows(capsys):
    shown = re.findall(
        r"^  (\S.*?)   +\S", README[README.index("kimi-native doctor` says") :], re.MULTILINE
    )
    cli.main(["doctor", "--quick"])
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    shown = shown[: shown.index("int4_grouped_swiglu") + 1]
    assert len(shown) == 10
    for label in shown:
        assert any(line.startswith(label + " ") for line in printed), label


def test_readme_names_every_verb_and_no_other(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    offered = set(re.findall(r"^    ([a-z-]+)(?:\s|$)", capsys.readouterr().out, re.MULTILINE))
    listed = set(re.findall(r"^kimi-native ([a-z-]+)", README, re.MULTILINE))
    assert listed == offered


def test_readme_names_every_verb_of_bench_and_no_other(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    offered = set(re.findall(r"^    ([a-z0-9-]+)(?:\s|$)", capsys.readouterr().out, re.MULTILINE))
    (listed,) = re.findall(r"^kimi-native bench (\S+)", README, re.MULTILINE)
    assert set(listed.split("|")) == offered


def test_readme_names_the_extra_that_a_checkpoint_may_need():
    """Beside those for working on the package there is one, and it is explained."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = extras["optional-dependencies"].keys() - {"test", "bench", "lint"}
    assert named == {"tokenizers"}
    assert "pip install '.[tokenizers]'" in README


def test_documents_name_programs_that_are_built():
    sources = (ROOT / "CMakeLists.txt", *ROOT.glob("cmake/*.cmake"))
    targets = r"add_(?:executable|custom_target)\((\w+)"
    built = {name for source in sources for name in re.findall(targets, source.read_text())}
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")):
        programs = set(re.findall(r"\bbuild/(?:\w+/)*(\w+)(?![\w/.])", path.read_text()))
        assert programs <= built, path.name


def test_readme_options_exist(capsys):
    for line in re.findall(r"^(kimi-native .*)$", README, re.MULTILINE):
        verb = line.split()[1]
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
        text = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", line):
            assert option in text, f"{verb} has no {option}"


def test_readme_tree_names_files_that_exist():
    tree = README[README.index("## The tree") :]
    names = re.findall(r"[\w*/]+\.py|[\w/]+/(?= )", tree)
    assert len(names) > 20
    for name in names:
        places = (ROOT, ROOT / "python/kimi_native", ROOT / "python/kimi_native/quant")
        assert any(list(p.glob(name.rstrip("/"))) for p in places), name
