"""The `retrykit` command."""

from __future__ import annotations

import sys
from typing import Final

# What the command line itself imports beyond retrykit: both come with one extra.
_EXTRA: Final = ("click", "rich")

__all__ = ["main"]


def main() -> None:
    """Run the command line; ends the process with its exit status."""
    try:
        from retrykit.cli.commands import retrykit
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        sys.exit(f'retrykit: the command line needs {" and ".join(_EXTRA)}: pip install "retrykit[cli]"')
    retrykit(prog_name="retrykit")
