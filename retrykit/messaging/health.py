"""Health over HTTP: whether a consumer's process lives, whether its workers are connected, what they have counted."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from types import TracebackType
from typing import Any, Final, Self

import attrs

from retrykit.check import wrong_type, wrong_value
from retrykit.messaging.readiness import Observed

_log = logging.getLogger("retrykit.messaging")

_MAX_PORT: Final = 65_535
_MAX_OPEN: Final = 8
_PATIENCE: Final = 5.0
_POLL: Final = 0.1

Page = tuple[HTTPStatus, dict[str, Any]]


def _live(_observed: Observed) -> Page:
    return HTTPStatus.OK, {"live": True}


def _ready(observed: Observed) -> Page:
    health = observed.health()
    status = HTTPStatus.OK if health.ready else HTTPStatus.SERVICE_UNAVAILABLE
    return status, {"ready": health.ready, "reasons": list(health.reasons)}


def _counters(observed: Observed) -> Page:
    health = observed.health()
    consumers = [one.to_json() for one in health.consumers]
    return HTTPStatus.OK, {"total": attrs.asdict(health.total), "consumers": consumers, "faults": list(health.faults)}


PAGES: Final[Mapping[str, Callable[[Observed], Page]]] = {
    "/health/live": _live,
    "/health/ready": _ready,
    "/health/counters": _counters,
}


class HealthServer:
    """Answers GET for `/health/live`, `/health/ready` and `/health/counters` with JSON, in threads of its own.

    `/health/live` is 200 while the process can answer. `/health/ready` is 200 when every worker is connected, else 503
    with the reasons. `/health/counters` has the `Counters` of each consumer and their total.

    `observed` is a container, a group, or anything else with `health()`. `port` 0 takes a free one, known after the
    start. It listens on the loopback address unless `host` says otherwise: nothing secret is told (names, destinations,
    numbers, classes of errors), but to anybody who asks. At most 8 requests are served at a time; a further one takes
    the place of the oldest.

    `with HealthServer(container, port=8080): container.run()`
    """

    def __init__(self, observed: Observed, *, port: int = 0, host: str = "127.0.0.1") -> None:
        if not callable(getattr(observed, "health", None)) or isinstance(observed, type):
            raise wrong_type("observed", "an object with health()", observed)
        if isinstance(port, bool) or not isinstance(port, int):
            raise wrong_type("port", "an int", port)
        if not 0 <= port <= _MAX_PORT:
            raise wrong_value("port", "a number from 0 to 65535", port)
        self.port = port
        self.host = host
        self._observed = observed
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/health"

    def start(self) -> None:
        """Listen. `OSError` when the port is taken or the host is none of this machine's."""
        if self._server is not None:
            raise RuntimeError("this server runs already")
        self._server = server = _Server((self.host, self.port), self._observed)
        self.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(_POLL,), name="retrykit-health", daemon=True).start()

    def close(self) -> None:
        """Stop listening. May be called again."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


class _Server(ThreadingTCPServer):
    """A thread for each connection, and not more than some of them."""

    # Not HTTPServer, which looks its own name up in the DNS first.
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], observed: Observed) -> None:
        self.observed = observed
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._open: dict[Any, None] = {}
        self._lock = threading.Lock()
        super().__init__(address, _Answer)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection; the oldest one makes room for it, should there be too many."""
        with self._lock:
            while len(self._open) >= _MAX_OPEN:
                oldest = next(iter(self._open))
                del self._open[oldest]
                # Its thread finds that there is nothing more to read.
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """The connection is done with."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is nobody's business; what else goes wrong is logged."""
        error = sys.exception()
        if not isinstance(error, OSError):
            _log.error("health: a request could not be answered: %r", error, exc_info=error)


class _Answer(BaseHTTPRequestHandler):
    """One request."""

    timeout = _PATIENCE
    server_version = "retrykit"
    sys_version = ""
    server: _Server

    def do_GET(self) -> None:
        """A page."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """A page without its body."""
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        page = PAGES.get(self.path.partition("?")[0])
        status, facts = _unknown() if page is None else page(self.server.observed)
        body = json.dumps(facts).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name for it
        """Probes come every few seconds: for those only who look for them."""
        _log.debug("health: %s", format % args)


def _unknown() -> Page:
    return HTTPStatus.NOT_FOUND, {"pages": list(PAGES)}
