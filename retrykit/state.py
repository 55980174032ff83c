"""What makes a call stateful: which item it is about, and what its source says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final, Literal

import attrs

from retrykit.check import wrong_type, wrong_value
from retrykit.key import Key, check_key
from retrykit.value import Value


def always(error: Exception) -> bool:  # noqa: ARG001 - the signature of `rollback_for`
    """Every failure is rethrown: the default of `RetryState.rollback_for`."""
    return True


KEEP_VETO: Final = "keep_veto"
_FIRST: Final = "redelivered"
_JOURNALS: Final = (_FIRST, "always", "never")
MAX_FINGERPRINT: Final = 200


@attrs.frozen(kw_only=True, slots=False, init=False, eq=False, repr=False)
class RetryState(Value):
    """What makes a call stateful: which item it is about, and what its source says of it.

    `key` names the item across deliveries; None means that there is nothing to remember (each failure is still
    rethrown). `redelivered`: True looks the history up and counts an attempt that never ended as a crash; False skips
    the look-up, so give it only for a source that never forgets; None (unknown) looks it up. `fresh` starts the history
    of an old key anew; with "keep_veto" a veto that somebody has laid on the key holds all the same.
    `rollback_for(error)`: False means try again in place instead of rethrowing. `recover_on_redelivery`: True (Spring's
    rule) rethrows the last failure as well and recovers at the next delivery; False recovers in the same call: right
    when the session is ours. `journal`: "redelivered" stores "attempt n was
    started" before an attempt unless the source says that it is the first delivery, "always" in any case, "never" not
    at all (then neither crashes nor attempts that run at the same time are counted before they fail). `fingerprint`: a
    short text made of the item's content, or a function that makes it when it is needed (a digest of the body): a key
    that comes back with another one names another item, and `InconsistentKeyError` says so before anything is run.
    """

    key: Key | None
    redelivered: bool | None = None
    fresh: bool | Literal["keep_veto"] = False
    rollback_for: Callable[[Exception], bool] = always
    recover_on_redelivery: bool = True
    journal: Literal["redelivered", "always", "never"] = "redelivered"
    fingerprint: str | Callable[[], str] | None = None

    def __init__(
        self,
        *,
        key: Key | None,
        redelivered: bool | None = None,
        fresh: bool | Literal["keep_veto"] = False,
        rollback_for: Callable[[Exception], bool] = always,
        recover_on_redelivery: bool = True,
        journal: Literal["redelivered", "always", "never"] = "redelivered",
        fingerprint: str | Callable[[], str] | None = None,
    ) -> None:
        # One is made for every message, so this does by hand what attrs would do: identity checks first, words only for
        # what is wrong; and what is not stored here is a default of the class.
        if type(key) is not str and key is not None:
            check_key(key)
        fields = self.__dict__
        fields["key"] = key
        if redelivered is False or redelivered is True:
            fields["redelivered"] = redelivered
        elif redelivered is not None:
            raise wrong_type("redelivered", "True, False or None", redelivered)
        if fresh is not False or rollback_for is not always or recover_on_redelivery is not True or journal != _FIRST:
            self._set_rare(fresh, rollback_for, recover_on_redelivery, journal)
        if fingerprint is not None:
            if not callable(fingerprint):
                _check_fingerprint(fingerprint)
            fields["fingerprint"] = fingerprint

    def content(self) -> str | None:
        """The fingerprint, made now if it was given as a function; None if there is none."""
        given = self.fingerprint
        return _check_fingerprint(given()) if callable(given) else given

    plain: ClassVar[bool] = True
    """Whether the store is not asked anything before a first delivery."""

    def _set_rare(self, fresh: Any, rollback_for: Any, recover_on_redelivery: Any, journal: Any) -> None:
        """Check and store what few states have."""
        if fresh is not True and fresh is not False and fresh != KEEP_VETO:
            raise wrong_type("fresh", f"True, False or {KEEP_VETO!r}", fresh)
        if recover_on_redelivery is not True and recover_on_redelivery is not False:
            raise wrong_type("recover_on_redelivery", "True or False", recover_on_redelivery)
        self.__dict__.update(fresh=fresh, recover_on_redelivery=recover_on_redelivery)
        if not callable(rollback_for):
            raise wrong_type("rollback_for", "callable", rollback_for)
        if journal not in _JOURNALS:
            raise (wrong_value if isinstance(journal, str) else wrong_type)("journal", f"one of {_JOURNALS}", journal)
        self.__dict__.update(rollback_for=rollback_for, journal=journal, plain=not fresh and journal != "always")


def _check_fingerprint(fingerprint: Any) -> str:
    if not isinstance(fingerprint, str):
        raise wrong_type("fingerprint", "a str, a function that gives one, or None", fingerprint)
    if not fingerprint or len(fingerprint) > MAX_FINGERPRINT:
        raise wrong_value("fingerprint", f"1 to {MAX_FINGERPRINT} characters", fingerprint)
    return fingerprint


for _field in attrs.fields(RetryState):
    if _field.default is not attrs.NOTHING:
        # A function in a class would become a method of its instances.
        setattr(RetryState, _field.name, staticmethod(always) if _field.default is always else _field.default)
