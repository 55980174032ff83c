"""README.md and the pages under docs/ are tests: each page that shows Python runs, top to bottom, as one test."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import tempfile
import types
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest._code import Traceback
from sybil import Sybil
from sybil.document import Document
from sybil.example import SybilFailure
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

from tests.docs.console import ConsoleBlockParser

ROOT = Path(__file__).parent
DOCS = ROOT / "docs"
SYBIL = Sybil([PythonCodeBlockParser(), ConsoleBlockParser(), SkipParser()])


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect a page of the documentation."""
    page = file_path == ROOT / "README.md" or (file_path.suffix == ".md" and DOCS in file_path.parents)
    return Page.from_parent(parent, path=file_path) if page else None


class Page(pytest.File):
    """A Markdown file."""

    def collect(self) -> Iterator[pytest.Item]:
        """One test for the whole page, since its blocks build on each other: no order or worker can part them."""
        document = SYBIL.parse(self.path)
        if any(document.examples()):
            yield PageTest.from_parent(self, name="blocks", document=document)


class PageTest(pytest.Item):
    """The Python blocks of a page, in a module and a working directory of their own."""

    def __init__(self, *, document: Document, **others: Any) -> None:
        super().__init__(**others)
        self.document = document

    def runtest(self) -> None:
        """Run the blocks in order; the first that fails ends the page."""
        with (
            _module(self.document) as module,
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
            pytest.MonkeyPatch.context() as surroundings,
        ):
            # Programs that a page writes and starts are to run on this very package.
            surroundings.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
            self.document.namespace = module.__dict__
            for example in self.document.examples():
                # A block may be left out; its page goes on.
                with contextlib.suppress(unittest.SkipTest):
                    example.evaluate()

    def _traceback_filter(self, excinfo: pytest.ExceptionInfo[BaseException]) -> Traceback:
        # From the block that failed on; what ran it is of no interest.
        return excinfo.traceback.cut(path=self.path)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show what a doctest expected and got without the machinery around it."""
        if isinstance(excinfo.value, SybilFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        """Where the page is."""
        return self.path, 0, str(self.path.relative_to(ROOT))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:  # noqa: ARG001 - the hook's name for it
    """What a page (or a test) tells the library's logger holds for that page only."""
    logger = logging.getLogger("retrykit")
    level = logger.level
    try:
        return (yield)
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _module(document: Document) -> Iterator[types.ModuleType]:
    # Classes look their annotations up in the module they were made in: a page that declares some needs a real one.
    module = types.ModuleType("page_" + Path(document.path).stem.lower())
    sys.modules[module.__name__] = module
    try:
        yield module
    finally:
        del sys.modules[module.__name__]
        # What a page leaves open is reported on this page, not on whichever test runs when it is collected.
        module.__dict__.clear()
        gc.collect()
