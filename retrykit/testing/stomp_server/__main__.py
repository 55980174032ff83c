"""`python -m retrykit.testing.stomp_server`: the embedded server as a process."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from retrykit.testing.stomp_server.engine import Engine
from retrykit.testing.stomp_server.process import PASSWORD_VARIABLE
from retrykit.testing.stomp_server.profiles import PROFILES, equipped
from retrykit.testing.stomp_server.server import checked_login, checked_port


def main() -> int:
    """Run until SIGTERM or SIGINT (or, with `--control`, until standard input ends); the exit status."""
    parser = _parser()
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    password = options.password if options.password is not None else os.environ.get(PASSWORD_VARIABLE)
    try:
        login = checked_login(options.user, password if options.user else None)
        checked_port(options.port)
        profile = equipped(options.profile, scheduler=not options.no_scheduler, redelivery=options.redelivery)
    except ValueError as error:
        parser.error(str(error))
    engine = Engine(profile, options.data, login, keep_flags=options.keep_flags)
    try:
        return asyncio.run(_serve(engine, options))
    except OSError as error:
        sys.stderr.write(f"the server cannot run: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m retrykit.testing.stomp_server",
        description="A STOMP server for tests. Prints one JSON line with its port when it is ready.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; only this machine can connect by default")
    parser.add_argument("--port", type=int, default=0, help="0 takes any free port")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="activemq", help="the broker to imitate")
    parser.add_argument("--data", type=Path, metavar="FILE", help="keep persistent messages in this file")
    parser.add_argument("--user", help="ask clients for this user name")
    parser.add_argument("--password", help=f"and this password; better given as ${PASSWORD_VARIABLE}")
    parser.add_argument(
        "--keep-flags", action="store_true", help="remember over a restart which messages were delivered"
    )
    parser.add_argument("--no-scheduler", action="store_true", help="be an ActiveMQ that heeds no AMQ_SCHEDULED_DELAY")
    parser.add_argument(
        "--redelivery",
        type=float,
        metavar="SECONDS",
        help="be an ActiveMQ whose plug-in has NACKed messages come again",
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help='take orders as JSON lines ({"do": "depths"}) from standard input, answer each with a line, end with it',
    )
    return parser


async def _serve(engine: Engine, options: argparse.Namespace) -> int:
    ended = asyncio.Event()
    failed: list[bool] = []
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)

    def fail() -> None:
        failed.append(True)
        ended.set()

    engine.on_failure = fail
    port = await engine.open(options.host, options.port)
    _say({"port": port, "host": options.host, "profile": options.profile, "pid": os.getpid()})
    control = asyncio.create_task(_control(engine, ended)) if options.control else None
    await ended.wait()
    if control is not None:
        control.cancel()
    await engine.close(crash=bool(failed))
    return 1 if failed else 0


async def _control(engine: Engine, ended: asyncio.Event) -> None:
    reader = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while line := await reader.readline():
            _say(_answer(engine, line))
    finally:
        ended.set()


def _answer(engine: Engine, line: bytes) -> dict[str, Any]:
    try:
        order = json.loads(line)
        return {"result": engine.do(order.pop("do"), order)}
    except Exception as error:  # noqa: BLE001 - whatever is wrong with an order is told to the one who gave it
        return {"error": f"{type(error).__name__}: {error}"}


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
