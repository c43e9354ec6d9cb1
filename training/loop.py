"""The one training loop: resumable, logged, plotted. Every part is trained by it."""

from __future__ import annotations

import csv
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, distributed

from attend_excite.metadata import digest_of
from training.sheets import plot_log


def use_one_thread() -> None:
    """Keep torch to OMP_NUM_THREADS, by default one: two waiting on each other are slower."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def join_processes() -> tuple[int, int]:
    """Join those that `torchrun` started: the number of this one, and how many there are; (0, 1) alone."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        distributed.init_process_group("gloo")
    return rank, world


@torch.no_grad()
def average_over_processes(parameters: list[Tensor]) -> None:
    """Replace each gradient with its mean over the processes, if there are several."""
    if not distributed.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def check_way_back(network: torch.nn.Module, compiled: Any, loss: Callable[[Any], Tensor]) -> None:
    """Compare the gradients that a compiled network gives with its own: a compiler may lose them on the way
    back where what comes forward is right, and then nothing tells but pictures that get worse.

    Args:
        network: whose parameters get the gradients, none of which is there yet.
        compiled: the same, compiled.
        loss: of either.

    Raises:
        RuntimeError: a parameter gets another gradient.
    """

    def gradients(passes: Any) -> list[Tensor | None]:
        loss(passes).backward()
        found = [parameter.grad for parameter in network.parameters()]
        for parameter in network.parameters():
            parameter.grad = None
        return found

    pairs = zip(gradients(network), gradients(compiled), strict=True)
    alike = [
        0.0 if other is None else torch.cosine_similarity(own.flatten(), other.flatten(), dim=0).item()
        for own, other in pairs
        if own is not None
    ]
    # Rounding to bfloat16 leaves 0.94 and more; one lost gradient is as bad as many.
    if min(alike) < 0.5:
        raise RuntimeError(
            f"compiled, the network has other gradients than its own (a cosine is {min(alike):.2f}): "
            "train without compiling on this machine, or find what is compiled wrongly"
        )


class Stateful(Protocol):
    """What a checkpoint holds: modules, optimisers, averages of weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Average:
    """Exponential moving average of the parameters of some modules."""

    def __init__(self, modules: list[torch.nn.Module], decay: float = 0.999) -> None:
        self.modules, self.decay, self.updates = modules, decay, 0
        self.shadow = [p.detach().clone() for p in self._parameters()]

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for module in self.modules for p in module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        # A young average would remember the first weights for a thousand steps.
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self._parameters()], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the live weights with the average; a second call undoes it."""
        for parameter, shadow in zip(self._parameters(), self.shadow, strict=True):
            live = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(live)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.updates = state["shadow"], state["updates"]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a neighbour of `path`, then rename: no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    write(draft)
    os.replace(draft, path)


def kept_arrays(path: Path, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Named arrays of an .npz file, which are made and written if it isn't there."""
    if not path.exists():
        made = make()

        def write(draft: Path) -> None:
            with draft.open("wb") as file:
                np.savez(file, **made)

        write_atomically(path, write)
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """The learning rate's factor: rises linearly, falls as a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def restore(folder: Path, parts: Mapping[str, Stateful], weights: str = "") -> int:
    """Load the last checkpoint of `folder` into `parts`; the number of steps done. `weights` stands for those
    that the run began from.

    Raises:
        SystemExit: what lies there began from others.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state.get("weights", weights) != weights:
        raise SystemExit(f"the run in '{folder}' began from other weights: choose another --runs")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


class Log:
    """A CSV file of means over `every` steps; rows after a resumed step are dropped."""

    def __init__(self, path: Path, start: int, every: int) -> None:
        self.path, self.every = path, every
        self.sums: dict[str, float] = defaultdict(float)
        self.count = 0
        if path.exists():
            with path.open() as lines:
                header, *rows = csv.reader(lines)
            kept = [row for row in rows if int(row[0]) <= start]
            with path.open("w", newline="") as lines:
                csv.writer(lines).writerows([header, *kept])

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] += value
        self.count += 1
        if step % self.every:
            return
        new = not self.path.exists()
        with self.path.open("a", newline="") as lines:
            writer = csv.writer(lines)
            if new:
                writer.writerow(["step", *self.sums])
            writer.writerow([step, *(f"{v / self.count:.5f}" for v in self.sums.values())])
        self.sums.clear()
        self.count = 0


def train(
    folder: Path,
    parts: Mapping[str, Stateful],
    take_step: Callable[[int], Mapping[str, float]],
    steps: int,
    on_save: Callable[[int], None] | None = None,
    save_seconds: float = 150,
    log_every: int = 20,
    seconds: float = math.inf,
    writes: bool = True,
    weights: Path | None = None,
) -> None:
    """Call `take_step(n)` for n = 0 … steps - 1, from where the last run stopped.

    Saves `checkpoint.pt` every `save_seconds` and at the end, then calls `on_save`
    (sample sheets) and redraws `log.png`. The end comes after `seconds` at the latest. Of several processes
    that train together one `writes`. `weights` is the folder that a run began from, if any: it isn't mixed
    up with a run from others.
    `take_step` gets its data from n alone, so that a resumed run sees what an unbroken one
    would have seen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun = "" if weights is None else digest_of(weights, weights.rglob("*.safetensors"))
    start = restore(folder, parts, begun)
    log = Log(folder / "log.csv", start, log_every) if writes else None

    def save(done: int) -> None:
        state = {"step": done, "weights": begun, **{name: part.state_dict() for name, part in parts.items()}}
        write_atomically(folder / "checkpoint.pt", lambda path: torch.save(state, path))
        if log is not None and log.path.exists():  # not yet, where the first steps were slow
            plot_log(log.path, folder / "log.png")
        if on_save is not None:
            on_save(done)

    if start >= steps and on_save is not None and log is not None:
        on_save(start)  # Stopped after its last checkpoint, perhaps before what follows it.
    began = saved = time.monotonic()
    for n in range(start, steps):
        losses = take_step(n)
        over = n + 1 == steps or time.monotonic() - began > seconds
        if log is not None:
            log.add(n + 1, losses)
        if log is not None and (over or time.monotonic() - saved > save_seconds):
            save(n + 1)
            saved = time.monotonic()
        if over:
            break
