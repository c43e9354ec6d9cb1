"""Whole workflows through the host's HTTP API: `pytest comfyui --host PATH`."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WORKFLOWS = Path(__file__).parent / "workflows"


@pytest.fixture(scope="module")
def server(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from comfyui.tests.server import serving

    with serving(host, tmp_path_factory.mktemp("host") / "base") as running:
        yield running


def workflow(name: str = "picture", seed: int = 1, **told: Any) -> dict[str, Any]:
    """A workflow at a size and with steps that take a CPU seconds."""
    nodes = json.loads((WORKFLOWS / f"{name}.json").read_text())
    nodes["5"]["inputs"] |= {"width": 128, "height": 128}
    nodes["4"]["inputs"] |= {"recipe": "no-refinement"} | told
    for sampler in (each for each in nodes.values() if each["class_type"] == "KSampler"):
        sampler["inputs"] |= {"steps": 4, "seed": seed}
    return nodes


def plain() -> dict[str, Any]:
    nodes = workflow()
    nodes["6"]["inputs"]["model"] = ["1", 0]
    del nodes["4"]
    return nodes


def test_a_workflow_draws_and_an_interrupt_leaves_the_model_clean(server: Any) -> None:
    (without,) = server.draw(plain())
    (under,) = server.draw(workflow())
    assert under.std() > 5
    assert not np.array_equal(under, without)
    (idle,) = server.draw(workflow(strength=0.0))
    assert np.array_equal(idle, without)
    # A run of hours, stopped.
    endless = copy.deepcopy(workflow(seed=2, recipe="recommended"))
    endless["6"]["inputs"]["steps"] = 5000
    running = server.queue(endless)
    time.sleep(10)
    server.ask("/interrupt", {})
    stopped = server.result(running, 120)
    assert "execution_interrupted" in [kind for kind, _ in stopped["status"]["messages"]]
    (again,) = server.draw(workflow())
    assert np.array_equal(again, under)
    (once_more,) = server.draw(plain())
    assert np.array_equal(once_more, without)


def test_maps_and_chips_come_back(server: Any) -> None:
    nodes = workflow("compare_and_maps")
    result = server.result(server.queue(nodes))
    assert result["status"]["status_str"] == "success", result["status"]
    outputs = result["outputs"]
    assert len(outputs["13"]["images"]) == len(outputs["15"]["images"]) == 2
    assert outputs["2"]["pieces"] == [[["a ", None], ["lion", 0], [" with a ", None], ["crown", 1]]]


def test_a_mistake_is_said_in_a_sentence(server: Any) -> None:
    nodes = workflow()
    nodes["2"]["inputs"]["subjects"] = "tiger"
    result = server.result(server.queue(nodes))
    assert result["status"]["status_str"] == "error"
    told = dict(result["status"]["messages"])["execution_error"]
    assert "'tiger' is not in the prompt" in told["exception_message"]
