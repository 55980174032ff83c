"""Database URLs: what they may be, how they are shown, and which driver each needs."""

from __future__ import annotations

from typing import Final

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from retrykit.check import shown, wrong_value
from retrykit.sql.dialects import database_of

_EXTRAS: Final = {"psycopg": "retrykit[postgresql]", "pymysql": "retrykit[mariadb]", "greenlet": "sqlalchemy[asyncio]"}
_EXAMPLES: Final = "sqlite:///retrykit.db, postgresql+psycopg://…, mariadb+pymysql://…"


def database_url(url: str | URL) -> URL:
    """The URL, parsed. ValueError, without the password, for what is no URL or none of a database supported here."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The cause quotes the text, and nobody knows where in that a password is.
        given = "a text with '@'" if "@" in str(url) else shown(url)
        raise ValueError(f"url: must be a database URL such as {_EXAMPLES}; not {given}") from None
    if database_of(parsed) is None:
        raise wrong_value("url", f"of a database supported here ({_EXAMPLES})", shown_url(parsed))
    try:
        parsed.get_dialect()
    except NoSuchModuleError:
        raise wrong_value("url", f"of a driver that SQLAlchemy knows ({_EXAMPLES})", shown_url(parsed)) from None
    except ModuleNotFoundError as error:
        raise missing_driver(parsed, error) from error
    return parsed


def is_async(url: URL) -> bool:
    """Whether the URL's driver is an asynchronous one."""
    return bool(url.get_dialect().is_async)


def shown_url(url: URL) -> str:
    """The URL without its password, nor the options, some of which are secrets too."""
    return url.set(query={}).render_as_string(hide_password=True)


def missing_driver(url: URL, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """What to install for the URL."""
    module = error.name or "its driver"
    wanted = _EXTRAS.get(module, module)
    msg = f'{shown_url(url)} needs the package {module}, which is not installed: pip install "{wanted}"'
    return ModuleNotFoundError(msg, name=error.name)
