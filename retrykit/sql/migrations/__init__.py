"""The migrations of the tables, for alembic: `env.py` runs them for `retrykit db`, `versions` is for anybody.

To run them with an application's own, give alembic both places and upgrade to `heads`:

    version_locations = %(here)s/versions
        retrykit.sql.migrations:versions
    path_separator = newline

They are a branch of their own (label `retrykit`), and each looks into `rk_schema` for what is done already: tables
that `create_tables` or `retrykit db upgrade` made are taken as they are.
"""

from __future__ import annotations

from pathlib import Path


def migrations_path() -> Path:
    """The folder of the version scripts, for `version_locations` of an application's own alembic."""
    return Path(__file__).parent / "versions"
