"""Draw on a Ray cluster: one worker a GPU, each taking the next batch when it is free.

Workers write to the run's folder themselves, so it must be one that all of them reach.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from attend_excite.benchmark.jobs import Conditions, conditions_of
from attend_excite.benchmark.run import Queue, Row, Work, draw, failed, write
from attend_excite.guidance.schedule import Recipe
from attend_excite.models import catalogue, load

try:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the executor 'ray' needs Ray: pip install 'attend-excite[ray]'") from error

# What a worker that is no more leaves behind. (Its machine had too little memory: OutOfMemoryError.)
_DIED = (RayActorError, NodeDiedError, OutOfMemoryError)

_MOST_WORKERS = 10_000

# Rows and settings go through Ray's object store, images don't.
_OBJECT_STORE_BYTES = 100 * 2**20

# How often a batch whose worker died is tried again before it counts as failed.
_RETRIES = 2

# Seconds to wait for a batch before looking whether other runs have left any.
_POLL = 1.0


class _Worker:
    """A model in a process of its own."""

    def __init__(self, model: str, device: str | None, dtype: str | None) -> None:
        self._model = load(model, device=device, dtype=dtype)

    def ready(self) -> None:
        """Come back once the model is loaded."""

    def describe(self, steps: int | None, guidance: float | None) -> tuple[Conditions, Recipe]:
        return conditions_of(self._model, steps, guidance), self._model.recipe

    def draw(self, run: str, work: Work) -> list[Row]:
        return write(run, work, draw(self._model, work.batch))


class RayWorkers:
    """Draws on the workers of a Ray cluster: see `ray_workers`.

    Ray could start workers and batches again itself, but it gives a batch to no other worker: where a machine
    is gone, and its worker finds no place on the others, the batch would wait for it for ever.
    """

    def __init__(self, start: Callable[[], Any], count: int) -> None:
        self._start = start
        self._workers = [start() for _ in range(count)]

    def describe(self, steps: int | None, guidance: float | None) -> tuple[Conditions, Recipe]:
        """See `Executor`.

        Raises:
            ValueError: the model cannot be loaded, or the workers have different ones under the same name.
        """
        try:
            told = ray.get([worker.describe.remote(steps, guidance) for worker in self._workers])
        except RayActorError as error:
            # Of a traceback, the last line: what was raised where the model was loaded.
            *_, reason = str(error).strip().splitlines()
            raise ValueError(f"a worker could not start: {reason.partition(': ')[2] or reason}") from error
        if any(other != told[0] for other in told):
            raise ValueError("the workers' models are not the same: give all machines the same files")
        return told[0]

    def draw(self, queue: Queue) -> Iterator[list[Row]]:
        """See `Executor`. A batch whose worker dies goes to the next that is free, and another is started.

        Raises:
            RuntimeError: all workers have died, and no other starts.
        """
        free = list(self._workers)
        starting: dict[Any, Any] = {}
        drawing: dict[Any, tuple[Any, Work]] = {}
        again = deque[Work]()
        deaths = Counter[str]()
        while queue or again or drawing:
            while free and (work := again.popleft() if again else queue.take()):
                worker = free.pop()
                drawing[worker.draw.remote(_from_anywhere(str(queue.run)), work)] = worker, work
            if not (free or drawing or starting):
                raise RuntimeError("all workers have died, and no other starts: the same command goes on")
            if not drawing:
                yield []
            if not (drawing or starting):
                time.sleep(_POLL)
                continue
            for result in ray.wait([*drawing, *starting], timeout=_POLL)[0]:
                if worker := starting.pop(result, None):
                    with suppress(*_DIED):  # it isn't tried a third time
                        ray.get(result)
                        free.append(worker)
                    continue
                worker, work = drawing.pop(result)
                try:
                    rows = ray.get(result)
                    free.append(worker)
                except RayTaskError as error:  # in the words of what it was, and not of how Ray passed it on
                    raise error.cause from error
                except _DIED:
                    ray.kill(worker)  # where it was only out of reach
                    other = self._start()
                    starting[other.ready.remote()] = other
                    deaths[work.wanted[0].name] += 1
                    if deaths[work.wanted[0].name] <= _RETRIES:
                        again.append(work)
                        continue
                    died = f"its worker died {_RETRIES + 1} times"
                    rows = write(queue.run, work, [(failed(job, died), None) for job in work.wanted])
                queue.finish(work, rows)
                yield rows


@contextmanager
def ray_workers(
    model: str, *, device: str | None, dtype: str | None, workers: int | None, address: str | None
) -> Iterator[RayWorkers]:
    """Start the workers, and end them after the block.

    Args:
        model: as for `load`.
        device: likewise.
        dtype: the name of one of torch's, as for `load`.
        workers: how many; None: as many as the cluster has GPUs, or CPUs if it has no GPU.
        address: of the cluster; None: one is started on this machine for the length of the block.

    Raises:
        ValueError: there is no cluster at the address, or it has less than it takes.
    """
    if workers is not None and not 1 <= workers <= _MOST_WORKERS:
        raise ValueError(f"the workers are {workers}: there must be 1 to {_MOST_WORKERS}")
    here: dict[str, Any] = {
        "num_cpus": workers,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    try:
        ray.init(
            address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if address else here),
        )
    except ConnectionError as error:
        raise ValueError(
            f"there is no Ray cluster at '{address}', or it asks for a token: then set RAY_AUTH_MODE=token "
            f"({error})"
        ) from error
    try:
        kind, count = _kind_and_count(workers)
        yield RayWorkers(partial(kind.remote, _source_from_anywhere(model), device, dtype), count)
    finally:
        ray.shutdown()


def _from_anywhere(folder: str) -> str:
    """A folder as it is named by workers that don't run where this was started."""
    return folder if "://" in folder else str(Path(folder).absolute())


def _source_from_anywhere(model: str) -> str:
    """The same of a model, where it is a folder or a file: a short name goes before a folder of that name."""
    return _from_anywhere(model) if model not in catalogue() and Path(model).exists() else model


def _kind_and_count(workers: int | None) -> tuple[Any, int]:
    """The remote class of the workers, and how many there are to be."""
    there = ray.cluster_resources()
    unit = "GPU" if there.get("GPU") else "CPU"
    count = workers or int(there[unit])
    if count > there[unit]:
        raise ValueError(f"{count} workers need {count} {unit}s, and the cluster has {there[unit]:g}")
    taken: dict[str, Any] = {"num_gpus": 1} if unit == "GPU" else {"num_cpus": 1}
    return ray.remote(**taken)(_Worker), count
