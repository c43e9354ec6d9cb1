"""Models for the tests: tiny random ones in Stable Diffusion's layout, and the bundled one."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from attend_excite import Model, load
from attend_excite.benchmark import store
from attend_excite.study.create import create_study
from tests import families

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer with Stable Diffusion's context of 77 tokens."""
    return families.clip_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Stable Diffusion 1.x of `tests.families`, saved in diffusers layout, `families.HURRIED`."""
    folder = tmp_path_factory.mktemp("tiny")
    families.stable_diffusion().save_pretrained(folder)
    recipe = {"base": "official"} | families.HURRIED
    (folder / "attend_excite.json").write_text(json.dumps({"recipe": recipe}), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Model:
    """The tiny model in float64, where rounding cannot hide a difference."""
    return load(tiny_folder, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="session")
def stickers() -> Model:
    """The bundled model."""
    return load("stickers", device="cpu")


@pytest.fixture(scope="session")
def stickers_joint() -> Model:
    """The bundled model with joint attention."""
    return load("stickers-joint", device="cpu")


@pytest.fixture
def same_model() -> Callable[[Model], Callable[[], None]]:
    """`check = same_model(model)`, then `check()` fails if anything of the model has changed."""

    def watch(model: Model) -> Callable[[], None]:
        before = _snapshot(model)

        def check() -> None:
            after = _snapshot(model)
            assert [key for key in before | after if before.get(key) != after.get(key)] == []

        return check

    return watch


def _snapshot(model: Model) -> dict[str, object]:
    state: dict[str, object] = {
        f"scheduler.{name}": _plain(value) for name, value in vars(model.pipeline.scheduler).items()
    }
    modules = {
        name: part for name, part in model.pipeline.components.items() if isinstance(part, torch.nn.Module)
    }
    for part, whole in modules.items():
        for name, module in whole.named_modules(prefix=part):
            hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
            processor = getattr(module, "processor", None)
            state[name] = (module.training, hooks, id(processor), "forward" in vars(module))
        for name, tensor in whole.state_dict(prefix=f"{part}:", keep_vars=True).items():
            state[name] = (tensor.requires_grad, tensor.dtype, _plain(tensor))
    return state


def _plain(value: object) -> object:
    return value.detach().numpy().tobytes() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark run of plain squares: two subsets of four prompts, three systems, three seeds."""
    folder = tmp_path_factory.mktemp("run")
    rows = []
    for index, (subset, prompt, system, seed) in enumerate(
        itertools.product(
            ("animals", "objects"), ("one", "two", "three", "four"), ("ours", "plain", "structure"), (3, 5, 8)
        )
    ):
        job = store.name_of(subset, prompt, system, seed)
        image = Image.new("RGB", (64, 64), (index * 3, 255 - index * 3, 128))
        row = {
            "job": job,
            "prompt": f"{prompt} of the {subset}",
            "subset": subset,
            "seed": seed,
            "system": system,
            "model": "squares",
            "image": store.write_png(folder, job, store.png_bytes(image)),
            "nsfw": False,
        }
        rows.append(row)
    store.write_rows(folder, rows)
    return folder


@pytest.fixture(scope="session")
def study_folder(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of six pages: four prompts, one check, one repeat."""
    folder = tmp_path_factory.mktemp("studies") / "study"
    create_study(small_run, folder, prompts_per_subset=2, seeds=2, checks=1, repeats=1, allow_none=True)
    return folder


@pytest.fixture
def serve_study(study_folder: Path, tmp_path: Path) -> Iterator[Callable[[], tuple[str, subprocess.Popen]]]:
    """`address, process = serve_study()` starts the study's server as people do, on one database a test."""
    started = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def serve() -> tuple[str, subprocess.Popen]:
        options = ["--port", str(port), "--database", f"sqlite:///{tmp_path}/votes.sqlite"]
        program = str(Path(sys.executable).with_name("attend-excite"))
        started.append(subprocess.Popen([program, "study", "serve", str(study_folder), *options]))
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/")
                return f"http://127.0.0.1:{port}", started[-1]
            time.sleep(0.1)
        raise TimeoutError("the study's server doesn't answer")

    yield serve
    for process in started:
        process.kill()
        process.wait()
