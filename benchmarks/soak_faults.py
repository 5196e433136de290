"""What goes wrong in the soak. Each fault returns when it is repaired, and the next update has to be good."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from processes import signal_to
from soak_scene import TIMEOUT
from soak_troupe import LOST

if TYPE_CHECKING:
    from soak_arena import Arena
    from soak_scene import Scene
    from soak_troupe import Troupe

Fault = Callable[["Arena", "Troupe"], None]


def kill_worker(arena: Arena, troupe: Troupe) -> None:
    index = arena.one(troupe)
    arena.slowed(troupe)
    with_restart = arena.chance.random() < 0.5
    outcome = arena.during(troupe, lambda: troupe.restart(index) if with_restart else troupe.workers[index].kill())
    arena.bounded(outcome, rejoins=True, ranks=troupe.scene.ranks)
    if not with_restart:
        troupe.restart(index)


def stop_worker(arena: Arena, troupe: Troupe) -> None:
    worker = troupe.workers[arena.one(troupe)]
    arena.slowed(troupe)
    outcome = arena.during(troupe, lambda: signal_to(worker, signal.SIGSTOP))
    signal_to(worker, signal.SIGCONT)
    arena.bounded(outcome, ranks=troupe.scene.ranks)
    arena.settled(worker)


def pause_worker(arena: Arena, troupe: Troupe) -> None:
    worker = troupe.workers[arena.one(troupe)]

    def pause() -> None:
        signal_to(worker, signal.SIGSTOP)
        time.sleep(arena.chance.random() * TIMEOUT / 3)
        signal_to(worker, signal.SIGCONT)

    arena.bounded(arena.during(troupe, pause), ranks=troupe.scene.ranks)


def kill_trainer(arena: Arena, troupe: Troupe) -> None:
    arena.slowed(troupe)
    arena.begin(troupe)
    arena.wait()
    troupe.trainer.kill()
    if arena.chance.random() < 0.5:
        for worker in troupe.workers:
            arena.settled(worker)
    troupe.trainer = troupe.another_trainer()


def stop_trainer(arena: Arena, troupe: Troupe) -> None:
    """Stop it for long; another one takes over; then it wakes up."""
    arena.slowed(troupe)
    arena.begin(troupe)
    arena.wait()
    stale = troupe.trainer
    stale.signal(signal.SIGSTOP)
    troupe.trainer = troupe.another_trainer()
    arena.recover(troupe)
    stale.signal(signal.SIGCONT)
    outcome, latest = arena.ended(stale), arena.version
    arena.wait()
    how = "done before" if outcome["error"] is None else outcome["error"].partition(":")[0]
    arena.counts[f"stale trainers: {how}"] += 1
    if any(worker.ask("served")[0] != latest for worker in troupe.workers):
        arena.find("torn", f"a stale trainer has published, or taken a version: {outcome['error']}")
    stale.stop()


def pause_trainer(arena: Arena, troupe: Troupe) -> None:
    def pause() -> None:
        troupe.trainer.signal(signal.SIGSTOP)
        time.sleep(arena.chance.random() * TIMEOUT / 3)
        troupe.trainer.signal(signal.SIGCONT)

    arena.bounded(arena.during(troupe, pause), ranks=troupe.scene.ranks)


def reset_connection(arena: Arena, troupe: Troupe) -> None:
    arena.slowed(troupe)
    outcome = arena.during(troupe, troupe.proxies[arena.one(troupe)].reset)
    arena.bounded(outcome, rejoins=True, ranks=troupe.scene.ranks)


def half_open(arena: Arena, troupe: Troupe) -> None:
    """Nothing passes between the trainer and a worker any more, and neither is told."""
    proxy = troupe.proxies[arena.one(troupe)]

    def swallow() -> None:
        proxy.swallows = True

    arena.slowed(troupe)
    outcome = arena.during(troupe, swallow)
    proxy.swallows = False
    proxy.reset()  # what was swallowed is missing in the middle of what comes
    arena.bounded(outcome, ranks=troupe.scene.ranks)


def slow_peer(arena: Arena, troupe: Troupe) -> None:
    proxy = troupe.proxies[arena.one(troupe)]
    proxy.delay = arena.chance.random() * 0.3
    arena.slowed(troupe)
    arena.begin(troupe)
    outcome = arena.ended(troupe.trainer)
    arena.bounded(outcome, ranks=troupe.scene.ranks)
    proxy.delay = 0.0


def failing_loader(arena: Arena, troupe: Troupe) -> None:
    index = arena.one(troupe)
    troupe.workers[index].ask("arm", fail_at=arena.chance.randrange(len(troupe.scene.weights)))
    arena.begin(troupe)
    outcome = arena.ended(troupe.trainer)
    arena.bounded(outcome, ranks=troupe.scene.ranks)
    troupe.workers[index].ask("arm")
    if troupe.url(index) in outcome["workers"] and troupe.scene.ranks == 1:
        arena.find("torn", "an update whose loader failed counts as good")


def failing_source(arena: Arena, troupe: Troupe) -> None:
    arena.begin(troupe, fail_at=arena.chance.randrange(len(troupe.scene.weights)))
    outcome = arena.ended(troupe.trainer)
    arena.bounded(outcome)
    if outcome["error"] is None:
        arena.find("torn", "an update whose source failed counts as good")


def second_trainer(arena: Arena, troupe: Troupe) -> None:
    """It takes over in the middle of an update of the first one, who then gives up."""
    first, second = troupe.trainer, troupe.another_trainer()
    arena.slowed(troupe)
    arena.begin(troupe)
    arena.wait()
    troupe.trainer = second
    arena.recover(troupe)
    arena.bounded(arena.ended(first), rejoins=True, ranks=troupe.scene.ranks)
    first.stop()


def kill_rank(arena: Arena, troupe: Troupe) -> None:
    arena.slowed(troupe)
    arena.begin(troupe)
    arena.wait()
    _, other = troupe.trainer.ranks
    other.kill()
    outcome = troupe.trainer.ranks[0].reply(LOST)
    arena.bounded(outcome, ranks=2)
    troupe.trainer.kill()
    troupe.trainer = troupe.another_trainer()


def end_worker(arena: Arena, troupe: Troupe) -> None:
    """By Ctrl-C or SIGTERM."""
    index = arena.one(troupe)
    arena.slowed(troupe)
    outcome = arena.during(troupe, lambda: arena.end([troupe.workers[index]]))
    arena.bounded(outcome, rejoins=True, ranks=troupe.scene.ranks)
    troupe.restart(index)


def end_trainer(arena: Arena, troupe: Troupe) -> None:
    """By Ctrl-C or SIGTERM."""
    arena.slowed(troupe)
    arena.begin(troupe)
    arena.wait()
    arena.end(troupe.trainer.ranks)
    troupe.trainer.kill()
    troupe.trainer = troupe.another_trainer()


ANYWHERE: list[Fault] = [
    kill_worker,
    stop_worker,
    pause_worker,
    kill_trainer,
    stop_trainer,
    pause_trainer,
    reset_connection,
    half_open,
    slow_peer,
    second_trainer,
    end_worker,
    end_trainer,
]


def faults_in(scene: Scene) -> list[Fault]:
    """Return what may go wrong in a scene."""
    kinds = list(ANYWHERE)
    if scene.ranks > 1:
        kinds.append(kill_rank)
    if not scene.in_place:
        kinds.append(failing_loader)
    if scene.layout == "passing":
        kinds.append(failing_source)
    return kinds
