"""A benchmark run's folder: local, or anywhere that fsspec reaches.

    RUN/run.json                        what the run is
    RUN/images/ab/<job>.png             ab: the first two characters of the job's name
    RUN/rows/<hash>.parquet             what happened to the images of one batch
    RUN/scores/<metric>/<hash>.parquet  what a metric says of some images
    RUN/claims/                         which batches are being drawn, and by whom

Every file is written to a temporary name and renamed: it is there whole or not at all. Nothing is appended
to, so any number of programs write to one folder; the readers merge. Which row of a job counts is told by
what it says, not by when it was written: clocks go wrong.

A disk may still lose what it was given. A table that cannot be read is left out with a warning, and a picture
that isn't as long as its row says, or cannot be read, counts as gone.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from PIL import Image

from attend_excite.files import write_whole

try:
    import fsspec
    import pyarrow as pa
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem
    from pyarrow import compute, parquet
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
        ("wanted", pa.string()),
        ("seed", pa.int64()),
        ("system", pa.string()),
        ("method", pa.string()),
        ("recipe", pa.string()),
        ("model", pa.string()),
        ("revision", pa.string()),
        ("image", pa.string()),
        ("bytes", pa.int64()),
        ("digest", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("nsfw", pa.bool_()),
        ("seconds", pa.float64()),
        ("unet_passes", pa.int32()),
        ("updates", pa.int32()),
        ("device", pa.string()),
        ("host", pa.string()),
        ("machine", pa.string()),
        ("versions", pa.string()),
        ("batch_prompts", pa.list_(pa.string())),
        ("batch_seeds", pa.list_(pa.int64())),
        ("attempt", pa.int32()),
        ("error", pa.string()),
    ]
)
"""The columns of a row: one image, or one that could not be drawn (`image` null, `error` says why).

`bytes` and `digest` are of the image's file, `batch_prompts` and `batch_seeds` what was drawn in one pass
with it, each prompt with each seed, and `attempt` counts how often the job had been drawn before; `wanted` is
what GenEval's rule asks, as JSON. Rows of earlier versions lack them.
"""

# Kept in the files and taken out by the readers. Only tells apart what else is alike.
_WRITTEN = "written"
_SETTINGS = "run.json"
_BROKEN = ".broken"
_READ_ONLY = ("http://", "https://")


class NoRunError(ValueError):
    """There is no run in a folder."""


class BrokenImageError(ValueError):
    """An image's file cannot be read as one."""


def read_rows(run: str | Path) -> pa.Table:
    """The rows of all batches with the columns of `ROW`, sorted by job.

    Of a job's rows one with an image goes before one without, then the latest attempt. Files that cannot be
    read are left out, with a warning that names them.
    """
    return _read_tables(run, "rows", ROW)


def write_rows(run: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of one batch. A column that a row lacks is null; rows of the same jobs are replaced."""
    _write_table(run, "rows", rows, ROW)


def read_scores(run: str | Path, metric: str) -> pa.Table:
    """What a metric says of the images: a column `job` and its own, sorted by job; of each job's scores those
    of the latest attempt. Files that cannot be read are left out, with a warning."""
    return _read_tables(run, f"scores/{metric}", pa.schema([("job", pa.string())]))


def write_scores(run: str | Path, metric: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a metric's scores of some images, each with its `job`."""
    _write_table(run, f"scores/{metric}", rows)


def set_aside_broken(run: str | Path, folder: str) -> None:
    """Rename the tables of a folder that cannot be read to "….broken", so that nobody stumbles on them again.

    What stood in them is made anew by whoever finds it missing.
    """
    files, root = open_folder(run)
    for path, table in _tables(files, f"{root}/{folder}"):
        if table is None:
            set_aside(run, path.removeprefix(f"{root}/"))


def set_aside(run: str | Path, path: str) -> None:
    """Rename a broken file to "….broken".

    Args:
        run: the run's folder, or its URL.
        path: of the file in it.
    """
    files, root = open_folder(run)
    try:
        files.mv(f"{root}/{path}", f"{root}/{path}{_BROKEN}")
    except FileNotFoundError:  # another program was faster
        return
    warnings.warn(f"'{path}' of '{run}' cannot be read: it is set aside as {path}{_BROKEN}", stacklevel=2)


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
    """An image by the path that its row gives.

    Raises:
        FileNotFoundError: there is none.
        BrokenImageError: there is one that cannot be read.
    """
    files, root = open_folder(run)
    content = _read(files, f"{root}/{path}")
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImageError(
            f"the picture '{path}' of '{run}' is broken: the same attend-excite benchmark run as before "
            "draws it again"
        ) from error
    return image


def image_size(run: str | Path, path: str) -> int:
    """The bytes of an image's file, by the path that its row gives; 0: there is none."""
    files, root = open_folder(run)
    try:
        return files.info(f"{root}/{path}")["size"]
    except FileNotFoundError:
        return 0


def image_sizes(run: str | Path) -> dict[str, int]:
    """The bytes of each image's file that is there, by its job."""
    files, root = open_folder(run)
    found = cast(dict[str, Any], files.find(f"{root}/images", detail=True))
    return {Path(path).stem: found[path]["size"] for path in _visible(found, ".png")}


def is_whole(row: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
    """Whether a row's image is there, and as long as it was when it was written.

    Args:
        row: with `job` and `bytes`.
        sizes: as `image_sizes` gives them.
    """
    size = sizes.get(row["job"], 0)
    return size > 0 and row["bytes"] in (None, size)


def write_png(run: str | Path, job: str, content: bytes) -> str:
    """Write a job's image, a PNG; returns its path relative to the run's folder."""
    files, root = open_folder(run)
    write_file(files, f"{root}/{image_path(job)}", content)
    return image_path(job)


def png_bytes(image: Image.Image) -> bytes:
    """An image as it is stored."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def name_of(*values: Any) -> str:
    """16 hex digits that stand for plain data, others for any other."""
    return digest_of(json.dumps(values, sort_keys=True).encode())


def digest_of(content: bytes) -> str:
    """16 hex digits that stand for the content of a file."""
    return hashlib.sha256(content).hexdigest()[:16]


def open_folder(run: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a run, and the run's folder there.

    Raises:
        ValueError: it is empty, or a URL that nobody here knows or that cannot be written to.
    """
    if not str(run).strip() or "\0" in str(run):
        raise ValueError("the run's folder is empty: give a path, or . for the current folder")
    if str(run).startswith(_READ_ONLY):
        raise ValueError(
            f"'{run}' is a web address, where nothing can be written: give a path, or storage's URL, as "
            "s3://bucket/run"
        )
    try:
        # Other machines write to the folder too, so what was listed once may not be kept.
        return url_to_fs(str(run), use_listings_cache=False)
    except ImportError as error:
        raise ValueError(f"'{run}' needs a package that isn't here: {error}") from error
    except ValueError as error:
        raise ValueError(f"'{run}' is no path, and no URL that is known here") from error
    except OSError as error:
        raise ValueError(f"'{run}' cannot be reached: {error.strerror or error}") from error


def write_file(files: fsspec.AbstractFileSystem, path: str, content: bytes) -> None:
    """Write a file whole, or not at all; on a disk of this machine, so that it outlives a loss of power."""
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    if isinstance(files, LocalFileSystem):
        write_whole(Path(path), content)
        return
    folder, _, name = path.rpartition("/")
    partial = f"{folder}/.{name}.{uuid4().hex}"
    try:
        files.pipe_file(partial, content)
        files.mv(partial, path)
    except BaseException:
        if files.exists(partial):
            files.rm_file(partial)
        raise


def _read(files: fsspec.AbstractFileSystem, path: str) -> bytes:
    return cast(bytes, files.cat_file(path))


def _visible(paths: Iterable[str], kind: str) -> list[str]:
    """Those of a kind, without what is only being written."""
    return [path for path in paths if path.endswith(kind) and not path.rpartition("/")[2].startswith(".")]


def _write_table(
    run: str | Path, folder: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None
) -> None:
    files, root = open_folder(run)
    table = pa.Table.from_pylist(list(rows), schema)
    table = table.append_column(_WRITTEN, pa.array([time.time()] * len(rows), pa.float64()))
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, write_page_checksum=True)
    name = name_of([row["job"] for row in rows])
    write_file(files, f"{root}/{folder}/{name}.parquet", buffer.getvalue())


def _read_tables(run: str | Path, folder: str, schema: pa.Schema) -> pa.Table:
    files, root = open_folder(run)
    tables = []
    for path, table in _tables(files, f"{root}/{folder}"):
        if table is not None:
            tables.append(table)
            continue
        warnings.warn(
            f"'{path.removeprefix(f'{root}/')}' of '{run}' cannot be read: it is left out", stacklevel=3
        )
    if not tables:
        return schema.empty_table()
    merged = pa.concat_tables([schema.empty_table(), *tables], promote_options="permissive")
    # What counts for more comes later.
    order = [("job", "ascending")]
    if "image" in schema.names:
        merged = merged.append_column("_drawn", compute.is_valid(merged["image"]))  # type: ignore[attr-defined]
        order.append(("_drawn", "ascending"))
    if "attempt" in merged.column_names:
        attempts = compute.fill_null(merged["attempt"], 0)  # type: ignore[attr-defined]
        merged = merged.append_column("_attempt", attempts)
        order.append(("_attempt", "ascending"))
    merged = merged.sort_by([*order, (_WRITTEN, "ascending")])
    last = {job: at for at, job in enumerate(merged["job"].to_pylist())}
    kept = [name for name in merged.column_names if name not in (_WRITTEN, "_drawn", "_attempt")]
    return merged.select(kept).take(list(last.values()))


def _tables(files: fsspec.AbstractFileSystem, folder: str) -> Iterator[tuple[str, pa.Table | None]]:
    """The tables of a folder by path; None for one that cannot be read."""

    def read(path: str) -> pa.Table | None:
        try:
            content = _read(files, path)
        except FileNotFoundError:  # another program has set it aside
            return None
        try:
            # Not read_table, which makes a data set of each file and takes several times as long.
            file = parquet.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
            table = file.read(use_threads=False)
        except (pa.ArrowException, OSError):
            return None
        return table if {"job", _WRITTEN} <= set(table.column_names) else None

    paths = _visible(files.find(folder), ".parquet")
    with ThreadPoolExecutor() as threads:
        yield from zip(paths, threads.map(read, paths), strict=True)
