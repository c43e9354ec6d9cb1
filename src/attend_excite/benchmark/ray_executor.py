"""Draw on a Ray cluster: one worker a GPU, each taking the next batch when it is free.

Workers write to the run's folder themselves, so it must be one that all of them reach.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attend_excite.benchmark.jobs import Batch, Conditions, conditions_of
from attend_excite.benchmark.run import Queue, Row, draw, failed, write
from attend_excite.guidance.schedule import Recipe
from attend_excite.models import catalogue, load

try:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.exceptions import RayActorError
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the executor 'ray' needs Ray: pip install 'attend-excite[ray]'") from error

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

    def describe(self, steps: int, guidance: float) -> tuple[Conditions, Recipe]:
        return conditions_of(self._model, steps, guidance), self._model.recipe

    def draw(self, run: str, batch: Batch) -> list[Row]:
        return write(run, draw(self._model, batch))


class RayWorkers:
    """Draws on the workers of a Ray cluster: see `ray_workers`."""

    def __init__(self, workers: list[Any]) -> None:
        self._workers = workers

    def describe(self, steps: int, guidance: float) -> tuple[Conditions, Recipe]:
        """See `Executor`.

        Raises:
            ValueError: the workers have different models under the same name.
        """
        told = ray.get([worker.describe.remote(steps, guidance) for worker in self._workers])
        if any(other != told[0] for other in told):
            raise ValueError("the workers' models are not the same: give all machines the same files")
        return told[0]

    def draw(self, queue: Queue) -> Iterator[list[Row]]:
        """See `Executor`. A batch whose worker dies is given to a new one."""
        free = list(self._workers)
        drawing: dict[Any, tuple[Any, Batch]] = {}
        while queue or drawing:
            while free and (batch := queue.take()):
                worker = free.pop()
                drawing[worker.draw.remote(_from_anywhere(str(queue.run)), batch)] = worker, batch
            if not drawing:
                time.sleep(_POLL)
            finished = ray.wait(list(drawing), timeout=_POLL)[0] if drawing else []
            if not finished:
                yield []
            for result in finished:
                worker, batch = drawing.pop(result)
                free.append(worker)
                try:
                    rows = ray.get(result)
                except RayActorError:
                    died = f"its worker died {_RETRIES + 1} times"
                    rows = write(queue.run, [(failed(job, died), None) for job in batch])
                queue.finish(batch, rows)
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
    if workers is not None and workers < 1:
        raise ValueError(f"the workers are {workers}: there must be 1 or more")
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
        yield RayWorkers(_start(_source_from_anywhere(model), device, dtype, workers))
    finally:
        ray.shutdown()


def _from_anywhere(folder: str) -> str:
    """A folder as it is named by workers that don't run where this was started."""
    return folder if "://" in folder else str(Path(folder).absolute())


def _source_from_anywhere(model: str) -> str:
    """The same of a model, where it is a folder: a short name goes before a folder of that name."""
    return _from_anywhere(model) if model not in catalogue() and Path(model).is_dir() else model


def _start(model: str, device: str | None, dtype: str | None, workers: int | None) -> list[Any]:
    there = ray.cluster_resources()
    unit = "GPU" if there.get("GPU") else "CPU"
    count = workers or int(there[unit])
    if count > there[unit]:
        raise ValueError(f"{count} workers need {count} {unit}s, and the cluster has {there[unit]:g}")
    taken: dict[str, Any] = {"num_gpus": 1} if unit == "GPU" else {"num_cpus": 1}
    kind = ray.remote(max_restarts=-1, max_task_retries=_RETRIES, **taken)(_Worker)
    return [kind.remote(model, device, dtype) for _ in range(count)]
