"""The network of the simulated farm: messages that are lost, doubled, late, and repeated long after their time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scheduler import events as e
from tests.scheduler.sim_life import Life, Shell
from tests.scheduler.sim_worker import Answer, SimWorker

#: A call that is not answered counts as failed after this time; an idle poll is answered after that.
TIMEOUT_S = 40.0
LONG_POLL_S = 10.0


@dataclass
class Link:
    """The coordinator's side of one worker: greet, then one poll after the other."""

    worker: SimWorker
    ack: int = 0
    incarnation: str = ""


class Network:
    """Carries orders, greetings and polls between the coordinator and its workers."""

    def __init__(self, life: Life, shell: Shell) -> None:
        self.life = life
        self.shell = shell
        self.links: list[Link] = []
        #: The incarnation of each worker that the shell greeted last.
        self.greeted: dict[str, str] = {}

    def _delay(self) -> float:
        return (
            self.life.chance.uniform(5.0, 60.0) if self.life.happens("late") else self.life.chance.uniform(0.001, 0.05)
        )

    def _through(self, worker: SimWorker) -> bool:
        return not self.life.happens("lose") and worker.cut_off_until <= self.life.now

    def send(self, name: str, order: Callable[[SimWorker], None]) -> None:
        """One message to whoever has that name when it arrives; it may be lost or come twice."""

        def arrive() -> None:
            worker = next(link.worker for link in self.links if link.worker.spec.id == name)
            if worker.alive and self._through(worker):
                order(worker)

        for _ in range(2 if self.life.happens("double") else 1):
            self.life.after(self._delay(), arrive)

    def greet(self, link: Link) -> None:
        life, worker = self.shell.life, link.worker

        def answer() -> None:
            if life != self.shell.life or link.worker is not worker:
                return
            if not worker.alive or not self._through(worker):
                self.life.after(2.0, lambda: self.again(link, life))
                return
            hello = worker.hello()
            link.ack = link.ack if link.incarnation == worker.spec.incarnation else 0
            link.incarnation = worker.spec.incarnation
            self._ghost(hello)
            if self.shell.turn(hello):
                self._poll(link)

        self.life.after(self._delay(), answer)

    def again(self, link: Link, life: int) -> None:
        if life == self.shell.life and self.shell.up:
            self.greet(link)

    def _poll(self, link: Link) -> None:  # noqa: C901  one exchange, three moments
        """Ask for what there is; a lost question or answer counts as silence, and the worker is greeted anew."""
        life, worker, asked = self.shell.life, link.worker, self.life.now
        answered = False

        def arrive() -> None:
            if not worker.alive or not self._through(worker):
                self.life.after(TIMEOUT_S, lambda: self.again(link, life))
            elif worker.outbox and worker.outbox[-1][0] > link.ack:
                answer()
            else:
                worker.waiting = answer
                self.life.after(LONG_POLL_S, answer)

        def answer() -> None:
            nonlocal answered
            if answered:
                return
            answered = True
            if worker.waiting is answer:
                worker.waiting = None
            if not worker.alive or not self._through(worker) or self.life.now - asked > TIMEOUT_S:
                self.life.after(TIMEOUT_S, lambda: self.again(link, life))
                return
            answered_with = worker.events(link.ack)
            self.life.after(self.life.chance.uniform(0.001, 0.05), lambda: take(answered_with))

        def take(answered_with: Answer) -> None:
            if life != self.shell.life or link.worker is not worker:
                return
            for event in (*answered_with.reports, answered_with.heartbeat):
                self._ghost(event)
            if self.greeted.get(worker.spec.id) != worker.spec.incarnation:
                # A ghost of an earlier life was greeted after this one.
                self.life.after(1.0, lambda: self.again(link, life))
                return
            if self.shell.turn(*answered_with.reports, answered_with.heartbeat):
                link.ack = answered_with.last
                self._poll(link)

        self.life.after(self._delay(), arrive)

    def hears(self, event: e.Event) -> None:
        self.shell.turn(event)

    def _ghost(self, event: e.Event) -> None:
        """Let the core hear something once more, long after its time."""
        if self.life.happens("ghost"):
            self.life.after(self.life.chance.uniform(1.0, 200.0), lambda: self.hears(event))
