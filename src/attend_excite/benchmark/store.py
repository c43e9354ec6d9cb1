"""A benchmark run's folder: local, or anywhere that fsspec reaches.

    RUN/run.json                        what the run is
    RUN/images/ab/<job>.png             ab: the first two characters of the job's name
    RUN/rows/<hash>.parquet             what happened to the images of one batch
    RUN/scores/<metric>/<hash>.parquet  what a metric says of some images
    RUN/claims/                         which batches are being drawn, and by whom

Every file is written to a temporary name and renamed: it is there whole or not at all. Nothing is appended
to, so any number of programs write to one folder; the readers merge.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from PIL import Image

try:
    import fsspec
    import pyarrow as pa
    from fsspec.core import url_to_fs
    from pyarrow import parquet
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the benchmark needs {error.name}: pip install 'attend-excite[benchmark]'"
    ) from error

ROW = pa.schema(
    [
        ("job", pa.string()),
        ("prompt", pa.string()),
        ("subset", pa.string()),
        ("subjects", pa.list_(pa.string())),
        ("seed", pa.int64()),
        ("system", pa.string()),
        ("method", pa.string()),
        ("recipe", pa.string()),
        ("model", pa.string()),
        ("revision", pa.string()),
        ("image", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("nsfw", pa.bool_()),
        ("seconds", pa.float64()),
        ("unet_passes", pa.int32()),
        ("updates", pa.int32()),
        ("device", pa.string()),
        ("host", pa.string()),
        ("versions", pa.string()),
        ("error", pa.string()),
    ]
)
"""The columns of a row: one image, or one that could not be drawn (`image` null, `error` says why)."""

# Kept in the files and taken out by the readers.
_WRITTEN = "written"
_SETTINGS = "run.json"


class NoRunError(ValueError):
    """There is no run in a folder."""


def read_rows(run: str | Path) -> pa.Table:
    """The rows of all batches with the columns of `ROW`, sorted by job; of a job's rows the newest."""
    return _read_tables(run, "rows", ROW)


def write_rows(run: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of one batch. A column that a row lacks is null; rows of the same jobs are replaced."""
    _write_table(run, "rows", rows, ROW)


def read_scores(run: str | Path, metric: str) -> pa.Table:
    """What a metric says of the images: a column `job` and its own, sorted by job; the newest of each job."""
    return _read_tables(run, f"scores/{metric}", pa.schema([("job", pa.string())]))


def write_scores(run: str | Path, metric: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a metric's scores of some images, each with its `job`."""
    _write_table(run, f"scores/{metric}", rows)


def read_settings(run: str | Path) -> dict[str, Any]:
    """What the run is, as `write_settings` was told.

    Raises:
        NoRunError: there is no run in the folder.
        ValueError: what it says cannot be read.
    """
    files, root = open_folder(run)
    try:
        settings = json.loads(_read(files, f"{root}/{_SETTINGS}"))
    except FileNotFoundError:
        raise NoRunError(f"there is no benchmark run in '{run}': it has no {_SETTINGS}") from None
    except ValueError as error:
        raise ValueError(f"the {_SETTINGS} of '{run}' cannot be read: {error}") from error
    if not all(isinstance(settings.get(name, {}), dict) for name in ("systems", "prompts")):
        raise ValueError(
            f"the run in '{run}' was drawn by an older version of attend-excite: draw it anew elsewhere"
        )
    return settings


def write_settings(run: str | Path, settings: Mapping[str, Any]) -> None:
    """Say what the run is."""
    files, root = open_folder(run)
    write_file(files, f"{root}/{_SETTINGS}", json.dumps(settings, indent=1, ensure_ascii=False).encode())


def image_path(job: str) -> str:
    """Where a job's image belongs, relative to the run's folder."""
    return f"images/{job[:2]}/{job}.png"


def read_image(run: str | Path, path: str) -> Image.Image:
    """An image by the path that its row gives."""
    files, root = open_folder(run)
    image = Image.open(io.BytesIO(_read(files, f"{root}/{path}")))
    image.load()
    return image


def image_size(run: str | Path, path: str) -> int:
    """The bytes of an image's file, by the path that its row gives."""
    files, root = open_folder(run)
    return files.info(f"{root}/{path}")["size"]


def write_image(run: str | Path, job: str, image: Image.Image) -> str:
    """Write a job's image; returns its path relative to the run's folder."""
    files, root = open_folder(run)
    write_file(files, f"{root}/{image_path(job)}", png_bytes(image))
    return image_path(job)


def png_bytes(image: Image.Image) -> bytes:
    """An image as it is stored."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def jobs_with_image(run: str | Path) -> set[str]:
    """The jobs whose image is there."""
    files, root = open_folder(run)
    return {Path(path).stem for path in files.find(f"{root}/images") if path.endswith(".png")}


def has_image(run: str | Path, job: str) -> bool:
    """Whether a job's image is there."""
    files, root = open_folder(run)
    return files.exists(f"{root}/{image_path(job)}")


def name_of(*values: Any) -> str:
    """16 hex digits that stand for plain data, others for any other."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def open_folder(run: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a run, and the run's folder there."""
    # Other machines write to the folder too, so what was listed once may not be kept.
    return url_to_fs(str(run), use_listings_cache=False)


def write_file(files: fsspec.AbstractFileSystem, path: str, content: bytes) -> None:
    """Write a file whole, or not at all."""
    partial = f"{path}.{uuid4().hex}.partial"
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    try:
        files.pipe_file(partial, content)
        files.mv(partial, path)
    except BaseException:
        if files.exists(partial):
            files.rm_file(partial)
        raise


def _read(files: fsspec.AbstractFileSystem, path: str) -> bytes:
    return cast(bytes, files.cat_file(path))


def _write_table(
    run: str | Path, folder: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None
) -> None:
    files, root = open_folder(run)
    table = pa.Table.from_pylist(list(rows), schema)
    table = table.append_column(_WRITTEN, pa.array([time.time()] * len(rows), pa.float64()))
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    name = name_of([row["job"] for row in rows])
    write_file(files, f"{root}/{folder}/{name}.parquet", buffer.getvalue())


def _read_tables(run: str | Path, folder: str, schema: pa.Schema) -> pa.Table:
    files, root = open_folder(run)

    def read(path: str) -> pa.Table:
        # Not read_table, which makes a data set of each file and takes several times as long.
        return parquet.ParquetFile(pa.BufferReader(_read(files, path))).read(use_threads=False)

    paths = [path for path in files.find(f"{root}/{folder}") if path.endswith(".parquet")]
    with ThreadPoolExecutor() as threads:
        tables = list(threads.map(read, paths))
    if not tables:
        return schema.empty_table()
    merged = pa.concat_tables(tables, promote_options="permissive")
    merged = merged.sort_by([("job", "ascending"), (_WRITTEN, "ascending")])
    newest = {job: at for at, job in enumerate(merged["job"].to_pylist())}
    return merged.take(list(newest.values())).drop_columns([_WRITTEN])
