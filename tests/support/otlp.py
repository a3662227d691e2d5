"""A real receiver of OTLP over HTTP (`rotel`), and the spans that it got, as it prints them."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import rotel  # type: ignore[import-untyped]

from tests.support.patience import PATIENCE_S
from tests.support.ports import free_port

AGENT = Path(rotel.__file__).parent / "rotel-agent"
_STATUS = re.compile(r"^ *Status message *:.*\n", re.MULTILINE)


@dataclass(frozen=True)
class ReceivedSpan:
    trace: str
    parent: str
    id: str
    name: str
    begin_ns: int
    end_ns: int
    status: str
    message: str
    attributes: dict[str, str] = field(default_factory=dict)
    links: tuple[str, ...] = ()


class OtlpReceiver:
    """Receiver of OTLP, with what it got so far. `url` is its base address."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.text = ""

    def spans(self) -> list[ReceivedSpan]:
        """Return what was printed so far; a span that is being printed is left out, or may lack its last attributes."""
        blocks = re.split(r"^Span #\d+\n", self.text, flags=re.MULTILINE)[1:]
        return [_parse(block) for block in blocks if _STATUS.search(block)]

    def wait_for(self, condition: Callable[[list[ReceivedSpan]], bool]) -> list[ReceivedSpan]:
        """Return all spans once they are as wanted; `condition` covers all that is asserted of them."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition(spans := self.spans()):
            assert time.monotonic() < deadline, [(span.name, span.attributes) for span in spans]
            time.sleep(0.1)
        return spans


@contextmanager
def receiving() -> Iterator[OtlpReceiver]:
    """Run a receiver for as long as the block does."""
    port = free_port()
    command = [
        str(AGENT),
        "start",
        *("--otlp-grpc-endpoint", f"127.0.0.1:{free_port()}", "--otlp-http-endpoint", f"127.0.0.1:{port}"),
        *("--exporter", "blackhole", "--debug-log", "traces", "--debug-log-verbosity", "detailed"),
    ]
    receiver = OtlpReceiver(f"http://127.0.0.1:{port}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                receiver.text += line

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield receiver
        finally:
            process.kill()
            reader.join()


def _parse(block: str) -> ReceivedSpan:
    def value(name: str) -> str:
        found = re.search(rf"^ *{name} *: ?(.*)$", block, flags=re.MULTILINE)
        return found[1] if found else ""

    attributes = block.partition("Attributes:\n")[2].partition("Links:\n")[0]
    return ReceivedSpan(
        trace=value("Trace ID"),
        parent=value("Parent ID"),
        id=value("ID"),
        name=value("Name"),
        begin_ns=int(value("Start time")),
        end_ns=int(value("End time")),
        status=value("Status code"),
        message=value("Status message"),
        attributes=dict(re.findall(r"^     -> ([\w.]+): \w+\((.*)\)$", attributes, flags=re.MULTILINE)),
        links=tuple(re.findall(r"^     -> ID: (\w+)$", block, flags=re.MULTILINE)),
    )
