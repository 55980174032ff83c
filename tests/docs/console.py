"""Console blocks of the documentation: those that look after a store run as they stand, and must say what they show."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

from sybil import Document, Region
from sybil.example import Example
from sybil.parsers.myst import CodeBlockParser

RUN = ("export RETRYKIT_", "retrykit contexts ", "retrykit db ", "retrykit parked ")
# What a terminal shows, without its colors.
TERMINAL = {"FORCE_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}
TIME = re.compile(r"\d\d:\d\d:\d\d \((in )?\d+ \w+( ago)?\)")


class ConsoleBlockParser(CodeBlockParser):
    """Runs the blocks in which every command is `$ retrykit contexts …` or the like; the others are left alone.

    In what is shown "…" stands for anything, a time with its distance for any other, and columns may be wider.
    """

    language = "console"

    def __call__(self, document: Document) -> Iterable[Region]:
        """The blocks that run."""
        for region in super().__call__(document):
            commands = [command for command, _ in _commands(region.parsed)]
            if commands and all(command.startswith(RUN) for command in commands):
                yield region

    def evaluate(self, example: Example) -> str | None:
        """None if every command said what is shown, else the difference in words."""
        environment = example.namespace.setdefault("_exported", {})
        faults = (_fault(command, shown, environment) for command, shown in _commands(example.parsed))
        return next(filter(None, faults), None)


def _commands(block: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, shown = part.replace("\\\n", " ").partition("\n")
        yield command, shown.strip("\n")


def _fault(command: str, shown: str, environment: dict[str, Any]) -> str | None:
    from click.testing import CliRunner

    from retrykit.cli.commands import retrykit

    program, *arguments = shlex.split(command)
    if program == "export":
        environment.update(argument.split("=", 1) for argument in arguments)
        return None
    result = CliRunner().invoke(retrykit, arguments, env=os.environ | TERMINAL | environment)
    if result.exit_code == 0 and (not shown or re.fullmatch(_pattern(shown), _plain(result.output), re.DOTALL)):
        return None
    said = f"{result.output}\n{result.exception or ''}"
    return f"$ {command}\nshould say:\n{shown}\nand says (status {result.exit_code}):\n{said}"


def _plain(text: str) -> str:
    lines = (re.sub(" {2,}", "  ", line.rstrip()) for line in text.rstrip().splitlines())
    return TIME.sub("TIME", "\n".join(lines))


def _pattern(shown: str) -> str:
    return ".*".join(map(re.escape, _plain(shown).split("…")))
