"""A private RabbitMQ that speaks STOMP: own ports, own node name and epmd, own data, ended by its own process ids."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.servers.process import STOP_SECONDS, ServerProcess, free_port, which
from tests.servers.tls import Authority
from tests.servers.wire import StompErrorFrame, Wire

HOME = Path("/usr/lib/rabbitmq/lib")
USER = "retrykit"
VIRTUAL_HOST = "tests"
"""A virtual host besides "/"."""


def rabbitmq_missing() -> str | None:
    """Say why RabbitMQ cannot be started here, or None when it can."""
    if _scripts() is None:
        return f"RabbitMQ is not installed ({HOME}/rabbitmq_server-*/sbin is absent): apt-get install rabbitmq-server"
    for program in ("erl", "epmd"):
        if which(program) is None:
            return f"RabbitMQ needs Erlang, whose {program} is not on the PATH"
    return None


def _scripts() -> Path | None:
    # Not the commands on the PATH: those change the user and lose the environment.
    return max(HOME.glob("rabbitmq_server-*/sbin"), default=None)


class RabbitMq(ServerProcess):
    """One RabbitMQ node; whoever connects without a name gets in too, as brokers for tests do."""

    account = "rabbitmq"

    def __init__(self, *, plugins: Iterable[str] = ("rabbitmq_stomp",), authority: Authority | None = None) -> None:
        """Choose free ports and a folder; nothing runs yet.

        `authority`: who signed the certificate with which it also speaks TLS, at `tls_port`.
        """
        super().__init__()
        self.authority, self.tls_port = authority, free_port()
        self.amqp_port, self._epmd_port, self._distribution_port = free_port(), free_port(), free_port()
        self._epmd: subprocess.Popen[bytes] | None = None
        self._plugins = tuple(plugins)

    @property
    def url(self) -> str:
        """The address that a `StompBroker` takes."""
        return f"stomp://{USER}:{self.password}@{self.host}:{self.port}"

    def control(self, *words: str) -> str:
        """Run `rabbitmqctl`; what it printed. It takes a second."""
        scripts = _scripts()
        assert scripts is not None, rabbitmq_missing()
        command = [str(scripts / "rabbitmqctl"), "--quiet", *words]
        surroundings = self._surroundings(subprocess.PIPE) | {"stderr": subprocess.PIPE}
        done = subprocess.run(command, timeout=60, check=False, text=True, **surroundings)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def keep_queues(self) -> None:
        """Have every queue that was made survive a power failure: one that was made a moment before may not.

        With it go the messages in it, though they are persistent and confirmed.
        """
        self.control("eval", "mnesia:sync_log().")

    def start(self) -> None:
        """Start the node and return when its STOMP port answers a CONNECT."""
        try:
            super().start()
        except BaseException:
            self._end_epmd()
            raise

    def stop(self) -> None:
        """End the node in good order."""
        super().stop()
        self._end_epmd()

    def kill(self) -> None:
        """End the node as a power failure would (SIGKILL)."""
        super().kill()
        self._end_epmd()

    def _end_epmd(self) -> None:
        if self._epmd is not None:
            self._epmd.terminate()
            self._epmd.wait(STOP_SECONDS)
            self._epmd = None

    def _prepare(self) -> None:
        (self.base / "plugins").write_text(f"[{','.join(self._plugins)}].")
        (self.base / "definitions.json").write_text(json.dumps(self._definitions()))
        settings = {
            "listeners.tcp.local": f"{self.host}:{self.amqp_port}",
            "stomp.listeners.tcp.1": f"{self.host}:{self.port}",
            "stomp.default_user": USER,
            "stomp.default_pass": self.password,
            "load_definitions": self.base / "definitions.json",
            "disk_free_limit.absolute": "10MB",
            "log.console.level": "warning",
        }
        if self.authority is not None:
            files = self.authority.write_pem(self.base)
            settings |= {f"ssl_options.{name}": path for name, path in files.items()}
            settings["stomp.listeners.ssl.1"] = f"{self.host}:{self.tls_port}"
            self._give_away(*files.values())
        (self.base / "rabbitmq.conf").write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
        program = which("epmd")
        assert program is not None, rabbitmq_missing()
        # A node that finds none starts one as a daemon, which outlives it.
        with self._log.open("ab") as log:
            command = [program, "-address", self.host, "-port", str(self._epmd_port)]
            self._epmd = subprocess.Popen(command, **self._surroundings(log))

    def _give_away(self, *files: Path) -> None:
        # A private key is for its owner's eyes only, and the node runs as somebody else than root.
        for file in files:
            if self._identity:
                os.chown(file, self._identity["user"], self._identity["group"])

    def _definitions(self) -> dict[str, Any]:
        salt = bytes.fromhex("5a17ab1e")
        password = hashlib.sha256(salt + self.password.encode()).digest()
        user = {"name": USER, "tags": "administrator", "hashing_algorithm": "rabbit_password_hashing_sha256"}
        rights = {"user": USER, "configure": ".*", "write": ".*", "read": ".*"}
        hosts = ("/", VIRTUAL_HOST)
        return {
            "users": [user | {"password_hash": base64.b64encode(salt + password).decode()}],
            "vhosts": [{"name": name} for name in hosts],
            "permissions": [rights | {"vhost": name} for name in hosts],
        }

    def _command(self) -> list[str]:
        scripts = _scripts()
        assert scripts is not None, rabbitmq_missing()
        return [str(scripts / "rabbitmq-server")]

    def _surroundings(self, log: Any) -> dict[str, Any]:
        surroundings = super()._surroundings(log)
        base = self.base
        settings = {
            "ERL_EPMD_PORT": self._epmd_port,
            "ERL_EPMD_ADDRESS": self.host,
            "RABBITMQ_NODENAME": f"retrykit-{self.port}@localhost",
            "RABBITMQ_DIST_PORT": self._distribution_port,
            "RABBITMQ_CONFIG_FILE": base / "rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_ENABLED_PLUGINS_FILE": base / "plugins",
            "RABBITMQ_MNESIA_BASE": base / "data",
            "RABBITMQ_LOG_BASE": base / "log",
            "RABBITMQ_LOGS": "-",
            "ERL_CRASH_DUMP_SECONDS": 0,
            "RABBITMQ_PID_FILE": base / "pid",
            # The script then becomes the node, in place of watching it: signals reach the node itself.
            "RUNNING_UNDER_SYSTEMD": "true",
        }
        return surroundings | {"env": surroundings["env"] | {name: str(value) for name, value in settings.items()}}

    def _answers(self) -> bool:
        try:
            Wire(self.host, self.port, virtual_host=None).close()
        except (OSError, AssertionError, StompErrorFrame):
            return False
        return True


def is_rabbit(server: object) -> bool:
    """Whether it is a RabbitMQ, or a double of one."""
    return isinstance(server, RabbitMq) or getattr(server, "profile", "") == "rabbitmq"
