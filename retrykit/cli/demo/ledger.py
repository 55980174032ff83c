"""The database of the demo: the rows that handlers write, and the count of them afterwards.

No key of the table forbids a second effect of a message: it would hide what the demo is there to show. A row needs an
account, and whether that is there is checked when the transaction commits, not before.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any, Final

import attrs
from sqlalchemy import Engine, ForeignKey, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from retrykit.errors import ContextCacheError
from retrykit.sql import ParkedItem, create_tables, parked_items, sqlite_engine
from retrykit.sql.sqlite import is_in_memory

_ACCOUNT: Final = 1
_NO_ACCOUNT: Final = -1


class _Table(DeclarativeBase):
    pass


class Account(_Table):
    """What effects are booked on."""

    __tablename__ = "demo_account"

    id: Mapped[int] = mapped_column(primary_key=True)


class Effect(_Table):
    """What a handler did about a message."""

    __tablename__ = "demo_effect"

    id: Mapped[int] = mapped_column(primary_key=True)
    run: Mapped[str] = mapped_column(index=True)
    message: Mapped[str]
    digest: Mapped[str]
    account: Mapped[int] = mapped_column(ForeignKey("demo_account.id", deferrable=True, initially="DEFERRED"))


@attrs.frozen
class Ledger:
    """The tables of the demo in one database; `sessions.begin` gives a session in a transaction."""

    engine: Engine
    sessions: sessionmaker[Session] = attrs.field(init=False, repr=False)

    @sessions.default
    def _sessions(self) -> sessionmaker[Session]:
        return sessionmaker(self.engine)

    @classmethod
    def at(cls, url: str) -> Ledger:
        """The ledger in the database at `url`; nothing is created. ValueError for a URL that will not do."""
        engine = sqlite_engine(url)
        if is_in_memory(engine.url):
            raise ValueError("url: must be a file: processes cannot share a database in memory")
        return cls(engine)

    def create(self) -> str | None:
        """Create what is missing; what prevents it, if something does."""
        try:
            create_tables(self.engine)
            _Table.metadata.create_all(self.engine)
            with self.sessions.begin() as session:
                if session.get(Account, _ACCOUNT) is None:
                    session.add(Account(id=_ACCOUNT))
        except DBAPIError as error:
            return f"{self.engine.url.render_as_string()}: {error.orig}"
        except ContextCacheError as error:
            return f"{self.engine.url.render_as_string()}: {error}"
        return None

    def effects(self, run: str) -> dict[str, list[str]]:
        """The digests of the bodies by message: one each, if every effect happened once."""
        found = defaultdict(list)
        with Session(self.engine.execution_options(retrykit_begin="DEFERRED")) as session:
            for message, digest in session.execute(select(Effect.message, Effect.digest).where(Effect.run == run)):
                found[message].append(digest)
        return dict(found)

    def parked(self, name: str) -> list[ParkedItem]:
        """What the template `name` parked."""
        return list(parked_items(self.engine, name=name))

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()


def write_effect(session: Any, run: str, message: str, body: bytes, *, storable: bool) -> None:
    """Write the effect of a message now, in the open transaction; it cannot commit unless the effect is `storable`."""
    session.add(Effect(run=run, message=message, digest=digest_of(body), account=_ACCOUNT if storable else _NO_ACCOUNT))
    session.flush()


def digest_of(body: bytes) -> str:
    """What tells one body from another."""
    return hashlib.sha256(body).hexdigest()[:16]
