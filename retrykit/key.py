"""The name of an item: what may be one, its canonical text in a store, and its JSON form."""

from __future__ import annotations

from typing import Any, Final, Union

from retrykit.check import wrong_type, wrong_value

Key = Union[str, int, bytes, tuple["Key", ...]]  # noqa: UP007 - `|` cannot join a class and a forward reference

MAX_TEXT: Final = 512
MAX_NAME: Final = 80
MAX_SPACE: Final = 240
_PLAIN: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def check_key(key: Any) -> None:
    """Refuse what cannot name an item in every store: `TypeError` naming the value.

    True equals 1 and 1.0 in every dict, so a bool would share another item's history: it is refused too.
    """
    if type(key) is str:
        return
    if isinstance(key, tuple):
        for part in tuple.__iter__(key):
            if type(part) is not str:
                check_key(part)
    elif isinstance(key, bool) or not isinstance(key, str | int | bytes):
        raise wrong_type("key", "a str, int, bytes or a tuple of these", key)


def namespace(name: str) -> str:
    """The text that every canonical key of a name starts with, before one of `/ # = ( ! @ ~`: names never overlap."""
    if not isinstance(name, str):
        raise wrong_type("name", "a str", name)
    if not name or len(name) > MAX_NAME:
        raise wrong_value("name", f"1 to {MAX_NAME} characters", name)
    space = "".join(letter if letter in _PLAIN else _escaped(letter) for letter in name)
    # A name beyond ASCII may take twelve characters a letter: what stands before the key must leave room for it.
    return space if len(space) <= MAX_SPACE else f"{space[: MAX_SPACE - 65]}~{_sha256(space)}"


def is_name(_instance: Any, _field: Any, name: Any) -> None:
    """An attrs validator: what a name may be."""
    namespace(name)


def _escaped(letter: str) -> str:
    return "".join(f"%{byte:02X}" for byte in letter.encode("utf-8", "surrogatepass"))


def canonical_key(name: str, key: Key) -> str:
    """The one text under which every store keeps the history of `key` for the templates called `name`.

    Different keys have different texts: `orders/m-1` for a str, `orders#7` for an int, `orders=6d2d31` for bytes,
    `orders(/a,#7)` for a tuple. Of a text over 512 characters the beginning is kept, after the SHA-256 of the whole.
    """
    return in_namespace(namespace(name), key)


def in_namespace(space: str, key: Key) -> str:
    """As `canonical_key`, for a namespace that was made before."""
    text = f"{space}/{key}" if type(key) is str else space + _text(key)
    # A lone surrogate or a NUL is a str to Python and an error to databases.
    if not text.isprintable():
        text = f"{space}!" + "".join(map(_readable, text[len(space) :]))
    return text if len(text) <= MAX_TEXT else _digested(space, text)


def lease_key(name: str, key: str, fence: int) -> str:
    """The text under which the lease of one running attempt of `key` (canonical text) is kept, beside its history."""
    space = namespace(name)
    return f"{space}@lease{fence}{key[len(space) :]}"


def _readable(letter: str) -> str:
    return letter if letter.isprintable() and letter != "%" else _escaped(letter)


def _digested(space: str, text: str) -> str:
    # A kind of its own, so that no other key can be made that looks like the outcome.
    return f"{space}~{_sha256(text)}{text[len(space) :]}"[:MAX_TEXT]


def _sha256(text: str) -> str:
    import hashlib  # few programs have keys or names that long; all of them import this module

    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _text(key: Key) -> str:
    # Kinds of str, int and bytes (enumerations, texts that hide themselves in logs) name the item that their content
    # names: it is read by the base class, because how they show themselves is their own affair.
    if isinstance(key, str):
        return f"/{str.__str__(key)}"
    if isinstance(key, int):
        return f"#{int.__repr__(key)}"
    if isinstance(key, bytes):
        return f"={bytes.hex(key)}"
    # Most parts are plain texts, and need not be asked what they are.
    parts = [f"/{len(part)}:{part}" if type(part) is str else _part(part) for part in tuple.__iter__(key)]
    return f"({','.join(parts)})"


def _part(key: Key) -> str:
    """A member of a tuple: a str is given its length, so that no content can look like the end of it."""
    return f"/{str.__len__(key)}:{str.__str__(key)}" if isinstance(key, str) else _text(key)


def key_to_json(key: Key | None) -> Any:
    """The JSON form: text and ints as they are, bytes as {"bytes": hex}, a tuple as a list."""
    if isinstance(key, str):
        return str.__str__(key)
    if isinstance(key, bytes):
        return {"bytes": bytes.hex(key)}
    if isinstance(key, tuple):
        return [key_to_json(part) for part in tuple.__iter__(key)]
    return None if key is None else int.__index__(key)


def key_from_json(value: Any) -> Key | None:
    """The key that a JSON form stands for."""
    if isinstance(value, dict):
        return bytes.fromhex(value["bytes"])
    if isinstance(value, list):
        return tuple(part for part in map(key_from_json, value) if part is not None)
    return value  # type: ignore[no-any-return]
