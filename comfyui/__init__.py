"""Attend-and-Excite as nodes for ComfyUI: the host's door into `nodes`."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "web"


async def comfy_entrypoint() -> Any:
    """What the host asks for when it starts. Its modules exist only then."""
    from .nodes import AttendExciteExtension

    return AttendExciteExtension()
