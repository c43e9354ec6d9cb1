"""ComfyUI's own server with these nodes and a tiny random checkpoint: for tests, and the README's picture."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import attend_excite

PACKAGE = Path(__file__).parents[1]
CHECKPOINT = "v1-5-pruned-emaonly.safetensors"
"""The name in the workflows; what is in it here is a small UNet of random weights."""


@dataclass(frozen=True)
class Server:
    """One that runs: where it listens, and its folder."""

    address: str
    folder: Path

    def ask(self, path: str, told: Any = None) -> Any:
        body = None if told is None else json.dumps(told).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def queue(self, workflow: dict[str, Any]) -> str:
        return self.ask("/prompt", {"prompt": workflow})["prompt_id"]

    def result(self, prompt: str, seconds: float = 600) -> dict[str, Any]:
        """What the history says of a prompt, once it is done."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := self.ask(f"/history/{prompt}").get(prompt):
                return found
            time.sleep(0.5)
        raise TimeoutError(prompt)

    def draw(self, workflow: dict[str, Any], node: str = "8") -> list[np.ndarray]:
        """The pictures that a node gives."""
        result = self.result(self.queue(workflow))
        assert result["status"]["status_str"] == "success", result["status"]
        files = result["outputs"][node]["images"]
        return [np.asarray(Image.open(self.folder / each["type"] / each["filename"])) for each in files]


@contextmanager
def serving(host: Path, folder: Path) -> Iterator[Server]:
    """In the block a server runs, whose models and pictures lie in a folder."""
    (folder / "custom_nodes").mkdir(parents=True)
    (folder / "custom_nodes" / "attend-excite").symlink_to(PACKAGE)
    (folder / "models" / "checkpoints").mkdir(parents=True)
    write_checkpoint(folder / "models" / "checkpoints" / CHECKPOINT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(Path(attend_excite.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(
            [
                *(sys.executable, "main.py", "--cpu", "--port", str(port), "--disable-auto-launch"),
                *("--base-directory", str(folder), "--database-url", "sqlite:///:memory:"),
                "--disable-api-nodes",
            ],
            cwd=host,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", folder)
        until = time.monotonic() + 300
        while True:
            try:
                server.ask("/system_stats")
                break
            except (urllib.error.URLError, ConnectionError):
                if running.poll() is not None or time.monotonic() > until:
                    raise RuntimeError((folder / "log").read_text()[-3000:]) from None
                time.sleep(1)
        yield server
    finally:
        running.terminate()
        running.wait(30)


def write_checkpoint(path: Path) -> None:
    """Of random weights in the format of Stable Diffusion 1.x: a small UNet, a text encoder of its size, and
    a small autoencoder."""
    import comfy.ops
    import comfy.sd1_clip
    import comfy.taesd.taesd
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    torch.manual_seed(0)
    unet = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[1, 1, 1],
        channel_mult=[1, 1, 1],
        transformer_depth=[0, 0, 1],
        transformer_depth_output=[0, 0, 0, 0, 1, 1],
        transformer_depth_middle=1,
        context_dim=768,
        num_heads=8,
        use_spatial_transformer=True,
        legacy=False,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    text = comfy.sd1_clip.SDClipModel(dtype=torch.float32)
    parts = {
        "model.diffusion_model.": unet,
        "cond_stage_model.transformer.": text.transformer,
        "first_stage_model.": comfy.taesd.taesd.TAESD(),
    }
    weights = {}
    for prefix, part in parts.items():
        for name, each in part.state_dict().items():
            if each.ndim > 1:
                # Louder than what is trained, so that the attention differs from patch to patch.
                each = torch.randn_like(each) * (1.2 if part is unet else 0.9) * each[0].numel() ** -0.5
            elif each.ndim == 1:
                each = torch.full_like(each, float(name.endswith("weight")))
            weights[prefix + name] = each.half().contiguous()
    save_file(weights, path)
