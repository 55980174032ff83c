"""Stand-ins that several tests use: a clock that waits for nobody, ears that remember, stores that fail on order."""

from __future__ import annotations

import pickle

from retrykit import MapRetryContextCache, RetryListener

EPOCH = 1_700_000_000.0


class ManualClock:
    """Time that stands still until somebody sleeps."""

    def __init__(self):
        self.elapsed = 0.0
        self.slept = []

    def time(self):
        return EPOCH + self.elapsed

    def monotonic(self):
        return 50.0 + self.elapsed

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.elapsed += seconds

    async def async_sleep(self, seconds):
        self.sleep(seconds)


class BrokenClock(ManualClock):
    """A clock that fails at everything but sleeping."""

    def time(self):
        raise OSError("no time")

    def monotonic(self):
        raise OSError("no monotonic time")


class Ears(RetryListener):
    """Remembers every event: (name, …)."""

    def __init__(self, log=None, name="ears"):
        self.log = [] if log is None else log
        self.name = name

    def _heard(self, *event):
        self.log.append((self.name, *event) if self.name != "ears" else event)

    def open(self, context):
        self._heard("open")

    def on_success(self, context, result):
        self._heard("on_success", result)

    def on_error(self, context, error, decision):
        self._heard("on_error", error, decision.retry)

    def on_recover(self, context, result):
        self._heard("on_recover", result)

    def close(self, context, error):
        self._heard("close", error)


class AsyncEars(Ears):
    """As `Ears`, asynchronous."""

    async def open(self, context):
        super().open(context)

    async def on_success(self, context, result):
        super().on_success(context, result)

    async def on_error(self, context, error, decision):
        super().on_error(context, error, decision)

    async def on_recover(self, context, result):
        super().on_recover(context, result)

    async def close(self, context, error):
        super().close(context, error)


class BrokenCache(MapRetryContextCache):
    """A cache whose named verbs raise while `faults` has an error for them."""

    def __init__(self, **faults):
        super().__init__()
        self.faults = dict(faults)

    def _fail(self, verb):
        fault = self.faults.get(verb)
        if fault is not None:
            raise fault

    def load(self, key):
        self._fail("load")
        return super().load(key)

    def save(self, key, snapshot, expected):
        self._fail("save")
        return super().save(key, snapshot, expected)

    def remove(self, key, expected=None):
        self._fail("remove")
        return super().remove(key, expected)


class AsyncCache:
    """An in-memory cache behind coroutine functions."""

    def __init__(self):
        self.inner = MapRetryContextCache()

    async def load(self, key):
        return self.inner.load(key)

    async def save(self, key, snapshot, expected):
        return self.inner.save(key, snapshot, expected)

    async def remove(self, key, expected=None):
        return self.inner.remove(key, expected)


class Fails:
    """A callback that raises the given errors in turn, then returns `value`; it remembers its contexts."""

    def __init__(self, *errors, value="done"):
        self.errors = list(errors)
        self.value = value
        self.contexts = []
        self.attempts = []

    @property
    def calls(self):
        return len(self.attempts)

    def __call__(self, context):
        self.contexts.append(context)
        self.attempts.append(context.attempt)
        if self.errors:
            raise self.errors.pop(0)
        return self.value


class Transaction:
    """A transaction that writes down what happens to it; an instance can be a template's `transaction`."""

    def __init__(self, log, begin=None, commit=None, rollback=None):
        self.log = log
        self.begin, self.commit, self.rollback = begin, commit, rollback

    def __call__(self):
        return self

    def __enter__(self):
        self.log.append("begin")
        if self.begin is not None:
            raise self.begin
        return "session"

    def __exit__(self, kind, error, trace):
        self.log.append("commit" if error is None else "roll back")
        fault = self.commit if error is None else self.rollback
        if fault is not None:
            raise fault


class AsyncTransaction(Transaction):
    """As `Transaction`, asynchronous."""

    __enter__ = None
    __exit__ = None

    async def __aenter__(self):
        return Transaction.__dict__["__enter__"](self)

    async def __aexit__(self, kind, error, trace):
        return Transaction.__dict__["__exit__"](self, kind, error, trace)


def pickled(value):
    """The value after it has been pickled and unpickled."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - of our own making
