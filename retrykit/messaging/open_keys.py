"""Which messages have a history: asked once a connection, so that first deliveries need not be looked up one by one.

A broker's `redelivered` flag is forgotten when the broker starts again, not while a connection lives. So at each new
connection the keys of the open histories, normally few, are loaded. A message that is neither flagged nor among them
has no history, unless an attempt on a connection that is gone stores its failure only now: that is counted all the
same, but may have run beside this delivery's attempt. Where there are more open keys than are worth keeping, or the
cache cannot tell, every message is looked up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from operator import call
from typing import TYPE_CHECKING, Any, Final

import attrs

from retrykit.errors import RetryError
from retrykit.key import Key, namespace

if TYPE_CHECKING:
    from retrykit.messaging.handler import Template

_log = logging.getLogger("retrykit.messaging")

LIMIT: Final = 1_000
"""So many open histories are loaded at most."""


@attrs.frozen
class OpenKeys:
    """The keys (canonical texts) that may have a history; None: any may."""

    keys: frozenset[str] | None = None

    def excludes(self, template: Template, key: Key) -> bool:
        """Whether the key surely has no history that was stored before this connection."""
        if not self.keys:
            # Mostly there is no open history at all, and the key needs no spelling.
            return self.keys is not None
        return template.key_of(key) not in self.keys


def open_keys_of(template: Template, complete: Callable[[Callable[[], Any]], Any] = call) -> OpenKeys:
    """Ask the template's cache; `complete` calls, and awaits what is asynchronous."""
    cache: Any = template.context_cache
    ask = getattr(cache, "open_keys", None)
    if ask is None:
        return OpenKeys()
    try:
        # Messages have tuples for keys: (destination, id).
        found: Iterable[str] | None = complete(lambda: ask(f"{namespace(template.name)}(", LIMIT))
    except RetryError as fault:
        _log.warning("%s: the open histories are not known, so every message is looked up: %s", template.name, fault)
        return OpenKeys()
    return OpenKeys(None if found is None else frozenset(found))
