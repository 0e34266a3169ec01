"""The rows of a data set, raw and numbered: from a file, the hub, or the starter set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from training.config import DataConfig
from training.dataset_info import read_entry
from training.rows import ALPACA, OPENAI, SHAREGPT, DataError, Layout, Row, RowProblem

STARTER = Path(__file__).parent / "starter" / "starter.jsonl"
STARTER_NAME = "starter"
SUFFIXES = (".json", ".jsonl", ".parquet")
_WHOLE = "train"  # the split of a data set that has but one


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from. `layout` is None where the rows' keys are to tell; `rows` can be read once."""

    name: str
    layout: Layout | None
    rows: Iterator[Row | RowProblem]  # a problem: a line that is not JSON


def load_rows(config: DataConfig) -> Source:
    """Opens the data set of a recipe. Raises DataError where there is none, at once or while its rows are read."""
    source = _from_dataset_info(config) if config.dataset_info else _from_name(config)
    return Source(source.name, source.layout, islice(source.rows, config.limit))


def _from_name(config: DataConfig) -> Source:
    layout = {"auto": None, "alpaca": ALPACA, "sharegpt": SHAREGPT, "openai": OPENAI}[config.format]
    path = Path(config.dataset)
    if config.dataset == STARTER_NAME:
        return Source(STARTER_NAME, layout or ALPACA, _local(STARTER, config.split))
    if path.exists() or path.suffix in SUFFIXES:
        return Source(config.dataset, layout, _local(path, config.split))
    if config.dataset.count("/") == 1 and not config.dataset.startswith((".", "/")):
        return Source(config.dataset, layout, _hub_rows(config.dataset, config.split))
    raise DataError(
        f"data.dataset = {config.dataset!r} is no local file, no hub id (owner/name) and not {STARTER_NAME!r}; "
        f"give one, or set data.dataset_info to the dataset_info.json that defines it"
    )


def _from_dataset_info(config: DataConfig) -> Source:
    assert config.dataset_info is not None
    if config.format != "auto":
        raise DataError(
            f"data.format = {config.format!r}: with data.dataset_info the entry tells it; leave it at 'auto'"
        )
    entry = read_entry(config.dataset_info, config.dataset)
    if entry.hf_hub_url is None:
        path = config.dataset_info.parent / str(entry.file_name)
        return Source(config.dataset, entry.layout(), _local(path, config.split))
    split = entry.split if entry.split and config.split == _WHOLE else config.split
    rows = _hub_rows(entry.hf_hub_url, split, name=entry.subset, data_dir=entry.folder, revision=entry.revision)
    return Source(config.dataset, entry.layout(), rows)


def _local(path: Path, split: str) -> Iterator[Row | RowProblem]:
    if split != _WHOLE:
        raise DataError(f"data.split = {split!r}: {path} is a file and has no splits; leave it at {_WHOLE!r}")
    return read_file(path)


def read_file(path: Path) -> Iterator[Row | RowProblem]:
    """Yields the rows of a JSON array, a JSON Lines or a Parquet file. Raises DataError where it is none of them.

    A line of a JSON Lines file that is not JSON is that row's problem; a torn array ends in DataError.
    """
    if path.is_dir() or path.suffix not in SUFFIXES:
        raise DataError(f"{path}: is {'a folder' if path.is_dir() else 'unknown'}; give a {', '.join(SUFFIXES)} file")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".json" and data.lstrip()[:1] == b"[":
        return _array_rows(path, data)
    return _line_rows(path, data)


def _line_rows(path: Path, data: bytes) -> Iterator[Row | RowProblem]:
    number = 0
    for line, text in enumerate(data.split(b"\n"), 1):
        if not text.strip():
            continue
        number += 1
        try:
            yield Row(number, line, _decode(text.decode("utf-8")))
        except (ValueError, RecursionError) as error:
            if path.suffix == ".json" and number == 1:
                raise DataError(f"{path}: neither an array of rows nor one JSON object a line: {error}") from error
            yield RowProblem(number, line, "row", f"is not JSON: {error}")


def _decode(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Builds an object; a key that stands twice would lose a value, so it is refused."""
    built: dict[str, Any] = {}
    for key, value in pairs:
        if key in built:
            raise ValueError(f"key {key!r} stands twice")
        built[key] = value
    return built


def _array_rows(path: Path, data: bytes) -> Iterator[Row]:
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    gap, number, line, counted = re.compile(r"\s*([\[,\]])\s*"), 0, 1, 0
    try:
        text = data.decode("utf-8")
        between = gap.match(text)
        while between and between[1] != "]":
            at = between.end()
            if between[1] == "[" and text.startswith("]", at):
                return
            line, counted = line + text.count("\n", counted, at), at
            value, end = decoder.raw_decode(text, at)
            number += 1
            yield Row(number, line, value)
            between = gap.match(text, end)
        if between is None:
            raise ValueError("the array does not end")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON array after row {number} (line {line}): {error}; is it torn?") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, None, value)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a whole Parquet file: {error}") from error


def _hub_rows(dataset: str, split: str, **options: str | None) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(dataset, split=split, **options)
    except Exception as error:  # whatever the hub, the network or the format raises
        raise DataError(
            f"data.dataset = {dataset!r}, split {split!r}: the hub did not give it ({type(error).__name__}: {error}); "
            "check the name, the split and the network, or give a local .json, .jsonl or .parquet file"
        ) from error
    for number, value in enumerate(rows, 1):
        yield Row(number, None, value)
