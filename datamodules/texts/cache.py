"""Rows in the Arrow cache of the datasets library."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

MANY = 50_000  # texts, for which a progress bar is worth its line


def cached_table(key: str, features: Any, read: Callable[[], Iterator[dict[str, Any]]]) -> Any:
    """Rows in the cache of the `datasets` library: read once, a thousand at a time, and memory-mapped afterwards.

    Under the same key, which is made of all that the rows depend on, nothing is read again; what `read` raises is
    raised. `Dataset.from_generator` does the same and checks each value by itself, which takes five times as long.
    """
    import datasets
    import pyarrow

    class Rows(datasets.ArrowBasedBuilder):  # type: ignore[misc]
        def _info(self) -> Any:
            return datasets.DatasetInfo(features=features)

        def _split_generators(self, dl_manager: Any) -> list[Any]:
            return [datasets.SplitGenerator("train")]

        def _generate_tables(self) -> Iterator[tuple[int, Any]]:
            rows = read()
            for number, some in enumerate(iter(lambda: list(itertools.islice(rows, 1000)), [])):
                yield number, pyarrow.Table.from_pylist(some, schema=features.arrow_schema)

    builder = Rows(dataset_name="texts", hash=key)
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    return builder.as_dataset("train")


def cached_map(table: Any, function: Callable[..., Any], features: Any, key: str, **options: Any) -> Any:
    """Columns that a tokenizer makes of the batches of a table, from the cache under this key or made now."""
    with progress_bars(len(table) > MANY):
        return table.map(
            function,
            batched=True,
            remove_columns=table.column_names,
            features=features,
            new_fingerprint=key,
            desc="tokenising",
            **options,
        )


@contextlib.contextmanager
def progress_bars(wanted: bool) -> Iterator[None]:
    """Lets the `datasets` library show its bars, or not."""
    import datasets

    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if wanted and not before else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()
