"""`python -m retrykit.cli`: the `retrykit` command where its script is not on the path."""

from __future__ import annotations

from retrykit.cli import main

main()
