"""The house itself: what can be seen without running the library."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import retrykit

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "retrykit"
CORE = sorted(PACKAGE.glob("*.py"))  # everything above is a folder, or a module that an extra brings
WITH_AN_EXTRA = {"redis"}
TEXT = {".py", ".md", ".toml", ".cfg", ".ini", ".txt", ".yml", ".yaml", ""}


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def _top_level_imports(module: ast.Module) -> set[str]:
    plain = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name.partition(".")[0] for node in plain for name in _imports(node)}


def _project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _tracked_texts() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("only a git checkout knows which files are the project's")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in names.split("\0") if name]
    return [file for file in files if file.suffix in TEXT and file.is_file()]


def test_the_package_is_a_sorted_table_of_contents():
    assert list(retrykit.__all__) == sorted(set(retrykit.__all__))
    for name in retrykit.__all__:
        assert getattr(retrykit, name) is not None


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_a_core_module_imports_the_standard_library_and_attrs_alone(path):
    if path.stem in WITH_AN_EXTRA:
        pytest.skip("comes with an extra")
    allowed = sys.stdlib_module_names | {"attr", "attrs", "retrykit", "trio"}
    imported = {name.partition(".")[0] for name in _imports(ast.parse(path.read_text()))}
    assert imported <= allowed


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_a_core_module_loads_asyncio_only_when_it_is_needed(path):
    assert "asyncio" not in _top_level_imports(ast.parse(path.read_text()))


def test_the_version_is_said_once():
    version = str(_project()["version"])
    saying = [path for path in PACKAGE.rglob("*.py") if f'"{version}"' in path.read_text()]
    assert saying == []


def test_the_extra_all_has_every_other_extra():
    extras = dict(_project()["optional-dependencies"])
    (everything,) = extras.pop("all")
    assert everything == f"retrykit[{','.join(sorted(extras))}]"


def test_no_file_knows_the_machine_it_was_written_on():
    machine = re.compile(r"(?<![\w.:/-])/(?:home|Users|root|work)/\w")
    knowing = [str(file.relative_to(ROOT)) for file in _tracked_texts() if machine.search(file.read_text())]
    assert knowing == []


def test_testing_needs_pytest_only_where_a_suite_is_run():
    program = "import sys; sys.modules['pytest'] = None; import retrykit.testing; retrykit.testing.StompServer"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
