"""A browser's runs, which the browser alone keeps."""

from __future__ import annotations

from typing import Any

from attend_excite.app.actions import Drawn
from attend_excite.app.views import PICTURE_URL, data_url

_REMEMBERED = 20


def entries(values: Any) -> list[dict[str, Any]]:
    """What of the browser's memory can be used: links with titles and small pictures."""
    if not isinstance(values, list):
        return []
    return [value for value in values[:_REMEMBERED] if _is_entry(value)]


def with_run(earlier: list[dict[str, Any]], drawn: Drawn) -> list[dict[str, Any]]:
    """The runs with one more, the latest first."""
    form = drawn.form
    seeds = f"seed {form.seed}" if form.pictures == 1 else f"seeds {form.seeds[0]} to {form.seeds[-1]}"
    # Beside the plain model there is one.
    methods = form.method if len(drawn.generations) <= 2 else f"{len(drawn.generations)} methods"
    entry = {
        "query": form.to_query(),
        "title": drawn.prompt.text,
        "made": f"{methods} · {form.steps} steps · {seeds}",
        "pictures": [data_url(run.images[0]) for run in drawn.generations.values()],
    }
    # A drawing and a comparison of the same form are two.
    before = [
        other for other in earlier if (other["query"], other["made"]) != (entry["query"], entry["made"])
    ]
    return [entry, *before][:_REMEMBERED]


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(key), str) for key in ("query", "title", "made"))
        and isinstance(value.get("pictures"), list)
        and all(isinstance(url, str) and url.startswith(PICTURE_URL) for url in value["pictures"])
    )
