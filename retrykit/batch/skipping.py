"""What may be skipped: which failures, and how many of them."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import attrs

from retrykit.check import are_error_types, as_types, error_types, one_of, whole, wrong_type, wrong_value
from retrykit.failure import type_name
from retrykit.policy import is_crash, nearest
from retrykit.value import Value


def _as_mapping(given: Any) -> Any:
    return dict(given) if isinstance(given, Mapping) else given


@attrs.frozen(kw_only=True, eq=False, repr=False)
class SkipPolicy(Value):
    """Which failures of an item are the item's own fault, so that it is put aside and the step goes on; and how many.

    The class nearest to the failure's own decides among `skip_for` and `no_skip_for`; what is named in neither stops
    the step. `limit`: so many items of all runs of a job (None: any number). `limits`: so many for an exception class
    and those derived from it, the nearest class counting. `share`: at most this part (0 to 1) of the items read so
    far, from the item number `share_from` on. `skip_crashes`: an item that kills its process is found and skipped
    too, over several restarts; it takes a job store, and a context cache that outlives the process.
    """

    skip_for: tuple[type[Exception], ...] = attrs.field(default=(), converter=as_types, validator=are_error_types)
    no_skip_for: tuple[type[Exception], ...] = attrs.field(default=(), converter=as_types, validator=are_error_types)
    limit: int | None = attrs.field(default=100, validator=whole(0, optional=True))
    limits: Mapping[type[Exception], int] = attrs.field(factory=dict, converter=_as_mapping, hash=False)
    share: float | None = attrs.field(default=None)
    share_from: int = attrs.field(default=1_000, validator=whole(1))
    skip_crashes: bool = attrs.field(default=False, validator=one_of(True, False))

    @limits.validator
    def _check_limits(self, field: Any, limits: Any) -> None:
        if not isinstance(limits, Mapping):
            raise wrong_type(field.name, "a mapping of exception classes to numbers", limits)
        error_types(field.name, tuple(limits))
        for one in limits.values():
            whole(0)(self, field, one)
        never = [kind for kind in limits if not self._may_count(kind)]
        if never:
            raise wrong_value(field.name, f"without {never[0].__name__}, no failure of which is skipped", limits)

    @no_skip_for.validator
    def _check_no_skip_for(self, field: Any, no_skip_for: Any) -> None:
        both = [kind.__name__ for kind in no_skip_for if kind in self.skip_for]
        if both:
            raise wrong_value(field.name, f"without {both[0]}, which is in skip_for", no_skip_for)

    @share.validator
    def _check_share(self, field: Any, share: Any) -> None:
        if share is None:
            return
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise wrong_type(field.name, "a number", share)
        if not 0 <= share <= 1:
            raise wrong_value(field.name, "from 0 to 1", share)

    def _may_count(self, kind: type[Exception]) -> bool:
        """Whether a failure of this class, or of one that is known below it, may be skipped."""
        named = (*self.skip_for, *self.no_skip_for)
        found = next((base for base in kind.__mro__ if base in named), None)
        own = found is not None and found not in self.no_skip_for
        return own or any(issubclass(one, kind) for one in self.skip_for)

    def may_skip(self, error: BaseException) -> bool:
        """Whether such a failure is the item's own fault."""
        if is_crash(error):
            return self.skip_crashes
        found = nearest(error, (*self.skip_for, *self.no_skip_for))
        return found is not None and found not in self.no_skip_for

    def limited_as(self, error: BaseException) -> str | None:
        """The name of the class in `limits` that counts this failure; None if there is none."""
        found = nearest(error, self.limits)
        return None if found is None else type_name(found)

    def refusal(self, error: BaseException, *, skipped: int, limited: Mapping[str, int], read: int) -> str | None:
        """Why one item more, the last of `read`, cannot be skipped; None if it can.

        `skipped` were before it, `limited` of them under the name of a class in `limits`.
        """
        if self.limit is not None and skipped >= self.limit:
            return f"limit={self.limit} items are skipped already"
        found = nearest(error, self.limits)
        if found is not None and limited.get(type_name(found), 0) >= self.limits[found]:
            return f"limits={self.limits[found]} for {found.__name__} are skipped already"
        if self.share is not None and read >= self.share_from and skipped + 1 > Fraction(str(self.share)) * read:
            return f"{skipped + 1} of {read} items would be more than share={self.share:g}"
        return None
