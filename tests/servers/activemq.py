"""A private ActiveMQ: own port, own data, foreground process, ended by its own process id."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.servers.tls import STORE_PASSWORD, Authority

HOME = Path("/usr/share/activemq")
START_SECONDS = 60.0
STOP_SECONDS = 20.0

_XML = """\
<beans xmlns="http://www.springframework.org/schema/beans" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
       xsi:schemaLocation="http://www.springframework.org/schema/beans
                           http://www.springframework.org/schema/beans/spring-beans-2.0.xsd
                           http://activemq.apache.org/schema/core
                           http://activemq.apache.org/schema/core/activemq-core.xsd">
  <broker xmlns="http://activemq.apache.org/schema/core" brokerName="tests" dataDirectory="{base}/data"
          useJmx="false" schedulerSupport="{scheduler}" useShutdownHook="true">
{plugins}    <destinationPolicy>
      <policyMap>
        <policyEntries>
          <!-- Queues of which the broker holds as much as this in memory, and lets nobody send more. -->
          <policyEntry queue="limited.>" memoryLimit="100 kb" producerFlowControl="true">
            <pendingQueuePolicy><vmQueueCursor/></pendingQueuePolicy>
          </policyEntry>
        </policyEntries>
      </policyMap>
    </destinationPolicy>
    <persistenceAdapter>
      <kahaDB directory="{base}/data/kahadb" journalMaxFileLength="4mb"/>
    </persistenceAdapter>
{keys}    <systemUsage>
      <systemUsage>
        <memoryUsage><memoryUsage limit="128 mb"/></memoryUsage>
        <storeUsage><storeUsage limit="512 mb"/></storeUsage>
        <tempUsage><tempUsage limit="128 mb"/></tempUsage>
        <jobSchedulerUsage><jobSchedulerUsage limit="64 mb"/></jobSchedulerUsage>
      </systemUsage>
    </systemUsage>
    <transportConnectors>
      <transportConnector name="stomp" uri="stomp://127.0.0.1:{port}?transport.tcpNoDelay=true"/>
{encrypted}    </transportConnectors>
  </broker>
</beans>
"""

_REDELIVERY = """\
    <plugins>
      <redeliveryPlugin fallbackToDeadLetter="true">
        <redeliveryPolicyMap>
          <redeliveryPolicyMap>
            <defaultEntry>
              <redeliveryPolicy maximumRedeliveries="-1" initialRedeliveryDelay="{delay}" redeliveryDelay="{delay}"/>
            </defaultEntry>
          </redeliveryPolicyMap>
        </redeliveryPolicyMap>
      </redeliveryPlugin>
    </plugins>
"""

_KEYS = """\
    <sslContext>
      <sslContext keyStore="file:{store}" keyStoreType="PKCS12" keyStorePassword="{password}"/>
    </sslContext>
"""

_ENCRYPTED = """\
      <transportConnector name="stomp+ssl" uri="stomp+ssl://127.0.0.1:{port}?transport.tcpNoDelay=true"/>
"""

_LOG4J = """\
log4j.rootLogger=WARN, out
log4j.appender.out=org.apache.log4j.ConsoleAppender
log4j.appender.out.layout=org.apache.log4j.PatternLayout
log4j.appender.out.layout.ConversionPattern=%d %-5p %c - %m%n
"""


def activemq_missing() -> str | None:
    """Say why ActiveMQ cannot be started here, or None when it can."""
    if not (HOME / "bin/activemq.jar").exists():
        return f"ActiveMQ is not installed ({HOME}/bin/activemq.jar is absent): apt-get install activemq"
    if shutil.which("java") is None:
        return "ActiveMQ needs java, which is not on the PATH"
    return None


class ActiveMq:
    """One broker process; `kill` and `restart` keep its port and its data.

    `base` is an empty directory of the caller's, which this server fills. `scheduler`: whether it keeps messages back.
    `redelivery`: with the plug-in that has a NACKed message come again after so many seconds (more than one).
    `authority`: who signed the certificate with which it also speaks TLS, at `tls_port`.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        base: Path,
        *,
        scheduler: bool = True,
        redelivery: float | None = None,
        authority: Authority | None = None,
    ) -> None:
        """Choose a free port and write the configuration; nothing runs yet."""
        self.base = base
        self.port, self.tls_port = _free_port(), _free_port()
        self.authority = authority
        self._process: subprocess.Popen[bytes] | None = None
        (base / "conf").mkdir(parents=True)
        (base / "scratch").mkdir()
        plugins = "" if redelivery is None else _REDELIVERY.format(delay=round(redelivery * 1000))
        settings = {"scheduler": str(scheduler).lower(), "plugins": plugins} | self._encryption()
        (base / "conf/activemq.xml").write_text(_XML.format(base=base, port=self.port, **settings))
        (base / "conf/log4j.properties").write_text(_LOG4J)

    def _encryption(self) -> dict[str, str]:
        if self.authority is None:
            return {"keys": "", "encrypted": ""}
        store = self.base / "conf/server.p12"
        self.authority.write_store(store)
        keys = _KEYS.format(store=store, password=STORE_PASSWORD)
        return {"keys": keys, "encrypted": _ENCRYPTED.format(port=self.tls_port)}

    @property
    def url(self) -> str:
        """The address that a `StompBroker` takes."""
        return f"stomp://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the running broker."""
        assert self._process is not None, "not running"
        return self._process.pid

    def start(self) -> None:
        """Start the broker and return when its STOMP port answers a CONNECT."""
        assert self._process is None, "already running"
        with (self.base / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._await_ready()

    def stop(self) -> None:
        """End the broker in good order (SIGTERM), the hard way if it takes too long."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reap()

    def kill(self) -> None:
        """End the broker as a power failure would (SIGKILL)."""
        assert self._process is not None, "not running"
        self._process.send_signal(signal.SIGKILL)
        self._reap()

    def restart(self) -> None:
        """Stop the broker if it runs, then start it with the same port and data."""
        self.stop()
        self.start()

    def _reap(self) -> None:
        assert self._process is not None
        self._process.wait()
        self._process = None

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(self.host, self.port):
            process = self._process
            assert process is not None
            if process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"ActiveMQ did not start:\n{self._log_tail()}")
            # The pause is bounded by the process's own end, so that a broker that dies is noticed at once.
            _wait_at_most(process, 0.05)

    def _log_tail(self) -> str:
        return (self.base / "broker.log").read_text(errors="replace")[-4000:]

    def _command(self) -> list[str]:
        base = self.base
        return [
            "java",
            # A test broker lives for seconds: cheap compilation and a small collector start it twice as fast.
            "-XX:TieredStopAtLevel=1",
            "-XX:+UseSerialGC",
            "-Xms64m",
            "-Xmx512m",
            f"-Djava.io.tmpdir={base}/scratch",
            f"-Dactivemq.home={HOME}",
            f"-Dactivemq.base={base}",
            f"-Dactivemq.conf={base}/conf",
            f"-Dactivemq.data={base}/data",
            f"-Dactivemq.classpath={base}/conf",
            "-jar",
            str(HOME / "bin/activemq.jar"),
            "start",
            f"xbean:file:{base}/conf/activemq.xml",
        ]

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_at_most(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _answers(host: str, port: int) -> bool:
    # An open port is not enough: the connector listens before the broker accepts clients.
    try:
        with socket.create_connection((host, port), timeout=2) as probe:
            probe.sendall(b"CONNECT\naccept-version:1.2\nhost:localhost\n\n\x00")
            return probe.recv(64).startswith(b"CONNECTED")
    except OSError:
        return False
