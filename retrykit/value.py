"""What the public values have in common: equality, hash and repr over their attrs fields, written once.

attrs can generate all three for each class, but compiles them when the class is made: for thirty classes that is most
of what `import retrykit` would cost.
"""

from __future__ import annotations

from typing import Any

import attrs


class Value:
    """Equal to another of the same class whose fields are equal; hashable if they are; shown with its fields."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return _compared(self) == _compared(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(
            (type(self), *(_key(self, field) for field in _fields(self) if field.eq and field.hash is not False))
        )

    def __repr__(self) -> str:
        fields = (field for field in _fields(self) if field.repr)
        shown = (f"{field.alias}={_text(field, getattr(self, field.name))}" for field in fields)
        return f"{type(self).__qualname__}({', '.join(shown)})"


def _fields(value: Any) -> Any:
    return attrs.fields(type(value))


def _compared(value: Any) -> tuple[Any, ...]:
    return tuple(_key(value, field) for field in _fields(value) if field.eq)


def _key(value: Any, field: Any) -> Any:
    """What a field is compared and hashed by: both by the same, so that equal values have equal hashes."""
    own = getattr(value, field.name)
    return field.eq_key(own) if field.eq_key else own


def _text(field: Any, value: Any) -> str:
    return repr(value) if field.repr is True else str(field.repr(value))
