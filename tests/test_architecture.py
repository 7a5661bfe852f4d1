"""The rules of CONTRIBUTING.md that can be read off the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "afq_export", ROOT / "tests"
MAX_LINES = 400
TORCH_FREE = ("torch", "onnx", "executorch", "transformers", "safetensors", "torchao", "optimum")
HOMES = {
    "executorch": ("lower/cortex_m/", "lower/executorch/", "lower/coreml/", "lower/tosa/", "lower/vulkan/", "runtime/"),
    "tosa_serializer": ("lower/tosa/",),
    "tosa_reference_model": ("runtime/tosa.py",),
    "onnx": ("lower/onnx/", "lower/qnn/", "runtime/saturation.py", "validate/specification.py"),
    "onnxruntime": ("lower/onnx/", "runtime/", "device/runners/onnx_runner.py"),
    "onnxruntime_qnn": ("runtime/",),
    "coremltools": ("lower/coreml/", "runtime/library.py"),
    "torchao": ("lower/vulkan/",),
    "openvino": ("lower/openvino/", "runtime/"),
    "ml_dtypes": ("lower/coreml/", "lower/onnx/", "lower/openvino/", "lower/qnn/", "runtime/saturation.py"),
    "lm_eval": ("zeroshot/",),
    "datasets": ("zeroshot/",),
    "optimum": ("lower/onnx/interface.py", "load/config.py", "optimum_command.py"),
}
"""Package -> the only places that import it. `device/runners/onnx_runner.py` is what runs on the device."""
LATER = {
    "backends",
    "cli",
    "commands",
    "device",
    "estimate",
    "guard",
    "job",
    "lower",
    "pipeline",
    "plan",
    "report",
    "revalidate",
    "runtime",
    "terminal",
    "validate",
    "zeroshot",
}
MACHINE_PATH = re.compile(r"(?<![\w.$}-])/(?:home|root|Users|work|mnt)/\w")
"""A folder that one machine has. `$HOME/x`, `~/x` and `../shared/x` are no such paths."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def inside(path: Path) -> str:
    """A module's path in the package."""
    return path.relative_to(PACKAGE).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    """First names of all imports, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]


def test_no_module_is_long() -> None:
    lengths = {inside(path): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("package", HOMES)
def test_a_runtime_is_imported_where_it_is_at_home(package: str) -> None:
    users = {inside(path) for path in modules() if package in imported(parsed(path))}
    assert users, "the rule is about something"
    assert [name for name in sorted(users) if not name.startswith(HOMES[package])] == []


def test_runtimes_know_nothing_of_each_other() -> None:
    """What is common to both lowerings stands beside them."""
    for one, other in (("onnx", "executorch"), ("executorch", "onnx")):
        for path in (PACKAGE / "lower" / one).glob("*.py"):
            assert f"afq_export.lower.{other}" not in path.read_text(encoding="utf-8"), inside(path)
            assert f"afq_export.runtime.{other}" not in path.read_text(encoding="utf-8"), inside(path)


def test_no_runtime_is_loaded_before_it_is_needed() -> None:
    """A target of the one does not need the other installed: `backends` imports them in the bodies of its functions."""
    assert loaded_by("afq_export.pipeline", "afq_export.plan") & {"onnx", "onnxruntime", "executorch"} == set()


def test_backends_have_the_same_names() -> None:
    """Those of the Backend protocol, with its parameters."""
    found = {}
    for name in sorted(path.stem for path in (PACKAGE / "backends").glob("*.py")):
        body = parsed(PACKAGE / "backends" / f"{name}.py").body
        if name == "__init__":
            body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == "Backend").body
        functions = [node for node in body if isinstance(node, ast.FunctionDef)]
        found[name] = {f.name: [a.arg for a in f.args.args if a.arg != "self"] for f in functions}
    promised = found.pop("__init__")
    assert promised
    for functions in found.values():
        assert promised == {name: functions.get(name) for name in promised}


def test_spec_imports_no_framework() -> None:
    found = {inside(path): set(imported(parsed(path))) & set(TORCH_FREE) for path in (PACKAGE / "spec").glob("*.py")}
    assert found and {name: heavy for name, heavy in found.items() if heavy} == {}


def test_spec_loads_no_framework() -> None:
    """Nor through what it imports from the rest of the package."""
    names = [f"afq_export.spec.{path.stem}" for path in sorted((PACKAGE / "spec").glob("[a-z]*.py"))]
    assert loaded_by(*names) & set(TORCH_FREE) == set()


def loaded_by(*names: str) -> set[str]:
    """First names of everything that importing modules loads, in a process of its own."""
    code = f"import sys, {', '.join(names)}; print(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("folder", ["spec", "arch", "fold", "quantize", "calibrate", "load"])
def test_early_stages_know_nothing_of_later_ones(folder: str) -> None:
    """What is calibrated and quantized does not depend on how it is lowered, run or reported."""
    for path in (PACKAGE / folder).glob("*.py"):
        names = [node.module or "" for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom)]
        parts = {name.split(".")[1] for name in names if name.startswith("afq_export.")}
        assert not parts & LATER, f"{inside(path)} imports {parts & LATER}"


def test_everything_public_has_a_docstring() -> None:
    bare = []
    for path in modules():
        tree = parsed(path)
        if tree.body and ast.get_docstring(tree) is None:
            bare.append(inside(path))
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None:
                bare.append(f"{inside(path)}: {node.name}")
    assert bare == []


def test_no_file_names_a_folder_of_one_machine() -> None:
    found = []
    for path in repository_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            lines = path.read_bytes().decode("latin-1").splitlines()
        name = path.relative_to(ROOT).as_posix()
        found += [f"{name}:{number}: {line[:100]}" for number, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert found == []


def repository_files() -> list[Path]:
    """What the repository holds, or would at the next commit; outside of a checkout, what has a known suffix."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        suffixes = (".py", ".toml", ".md", ".json", ".txt")
        return [path for path in ROOT.rglob("*") if path.suffix in suffixes and path.is_file()]
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_pattern_of_machine_paths() -> None:
    roots = ("home", "root", "Users", "work", "mnt")
    assert all(MACHINE_PATH.search(f'"/{root}/someone"') for root in roots)
    assert not any(
        MACHINE_PATH.search(text) for text in ("../work/x", "a/home/b", "$HOME/work/x", "https://x.y/work/z")
    )


def test_every_test_asserts_something() -> None:
    idle = []
    for path in sorted(TESTS.rglob("test_*.py")):
        tree = parsed(path)
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        helpers = {node.name for node in functions if checks(node, set())}
        helpers |= {node.name for node in functions if checks(node, helpers)}
        tests = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
        assert tests, f"{path.name} has no test"
        idle += [f"{path.relative_to(TESTS)}: {test.name}" for test in tests if not checks(test, helpers)]
    assert idle == []


def checks(function: ast.FunctionDef, helpers: set[str]) -> bool:
    """Whether `function` has an assertion or an expected exception of its own, or uses one of `helpers` that has."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in {"raises", "refused", "assert_close"} | helpers:
                return True
    return False
