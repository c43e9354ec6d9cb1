"""A browser's runs, which the browser alone keeps."""

from __future__ import annotations

import json
from typing import Any

from attend_excite.app.actions import Drawn
from attend_excite.app.limits import MAX_PICTURES
from attend_excite.app.views import PICTURE_URL, data_url

_REMEMBERED = 20
_KEY = "attend-excite-history"

# All of it lies in the browser, and each tab reads it anew before it adds a run: of two tabs neither forgets
# what the other has drawn.
READ = f"() => [localStorage.getItem('{_KEY}') || '[]']"
ADD = f"""(entry) => {{
  let runs = [];
  try {{ runs = JSON.parse(localStorage.getItem("{_KEY}")) || []; }} catch {{ }}
  if (entry) {{
    const run = JSON.parse(entry);
    // A drawing and a comparison of the same form are two.
    runs = [run, ...runs.filter((other) => other.query !== run.query || other.made !== run.made)];
    runs = runs.slice(0, {_REMEMBERED});
    // Where the browser has no room for all, the oldest go.
    for (; runs.length; runs.pop()) {{
      try {{ localStorage.setItem("{_KEY}", JSON.stringify(runs)); break; }} catch {{ }}
    }}
  }}
  return [JSON.stringify(runs)];
}}"""


def entries(text: str | None) -> list[dict[str, Any]]:
    """What of the browser's memory can be used: links with titles, small pictures and the names of files."""
    try:
        values = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return []
    if not isinstance(values, list):
        return []
    return [value for value in values[:_REMEMBERED] if _is_entry(value)]


def entry_of(drawn: Drawn) -> str:
    """A run as JSON, for the browser to put before those that it has."""
    form = drawn.form
    seeds = (
        f"seed {drawn.seeds[0]}" if len(drawn.seeds) == 1 else f"seeds {form.seeds[0]} to {form.seeds[-1]}"
    )
    # Beside the plain model there is one.
    methods = form.method if len(drawn.generations) <= 2 else f"{len(drawn.generations)} methods"
    # Which no link carries.
    begun = f" · from a picture, {form.strength:.0%} made anew" if form.image else ""
    paths = [path for row in drawn.files.values() for path in row]
    entry = {
        "query": form.to_query(),
        "title": drawn.prompt.text,
        "made": f"{methods} · {form.steps} steps · {seeds}{begun}",
        "pictures": [data_url(run.images[0]) for run in drawn.generations.values()],
        "folder": paths[0].parent.name,
        "files": {label: [path.name for path in row] for label, row in drawn.files.items()},
    }
    return json.dumps(entry)


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(key), str) for key in ("query", "title", "made", "folder"))
        and isinstance(value.get("files"), dict)
        and all(_are_texts(row) for row in value["files"].values())
        and isinstance(value.get("pictures"), list)
        and all(isinstance(url, str) and url.startswith(PICTURE_URL) for url in value["pictures"])
    )


def _are_texts(row: Any) -> bool:
    return isinstance(row, list) and len(row) <= MAX_PICTURES and all(isinstance(name, str) for name in row)
