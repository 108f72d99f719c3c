"""Data sets of the Hugging Face hub, of a folder or of a script's cache."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..labels.values import class_labels, some


def load_splits(
    source: Mapping[str, Any], split_names: Mapping[str, str | None], columns: Sequence[str]
) -> dict[str, Any]:
    """Splits of a data set as `datasets.Dataset`; downloads them if they are not there.

    Args:
        source: Arguments of `datasets.load_dataset`.
        split_names: Name here to name there; those without one are omitted.
        columns: What each split must have.

    Raises:
        FileNotFoundError: No such data set, or the hub cannot be reached.
        ValueError: A split or a column that does not exist.
    """
    import datasets  # slow to import: only where it is used

    try:
        found = datasets.load_dataset(**source)
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        where = source["data_files"] or source["path"]
        raise FileNotFoundError(
            f"no data set {where}: expected a name on the hub that can be reached, a folder, or a format "
            f"(parquet, imagefolder) with data_files ({str(error).splitlines()[0]})"
        ) from error
    tables = {}
    for split, name in split_names.items():
        if name is None:
            continue
        if name not in found:
            raise ValueError(f"no split {name!r} in {source['path']}: it has {', '.join(found)}")
        for column in columns:
            if column not in found[name].column_names:
                has = ", ".join(found[name].column_names)
                raise ValueError(f"no column {column!r} in split {name!r} of {source['path']}: it has {has}")
        tables[split] = found[name]
    check_class_labels(source["data_files"], tables)
    return tables


def class_label_names(table: Any, column: str) -> list[str] | None:
    """Names of a column's ClassLabel, or of the one that its lists hold, if it is one."""
    feature = table.features[column]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return None if names is None else list(names)


def row_namer(path: str, split: str | None) -> Callable[[int], str]:
    """Names a row of a split, for an error."""
    return lambda row: f"{path}, split {split!r}, row {row}"


def check_class_labels(data_files: Mapping[str, Any] | None, tables: Mapping[str, Any]) -> None:
    """Refuse, with a ValueError that names it, a Parquet file whose classes stand in another order than the first
    one's, by which all are read.
    """
    import pyarrow.parquet  # comes with datasets

    names = {name: class_label_names(table, name) for table in tables.values() for name in table.column_names}
    patterns = [one for given in (data_files or {}).values() for one in ([given] if isinstance(given, str) else given)]
    files = [file for pattern in patterns for file in glob.glob(pattern) if file.endswith(".parquet")]
    for file in files:
        for column, own in class_labels(pyarrow.parquet.read_schema(file).metadata).items():
            if (others := names.get(column)) is not None and others != own:
                raise ValueError(
                    f"{file}: the classes of {column!r} are {some(own)}, and elsewhere {some(others)}: all files are "
                    "read by one order; write them with one ClassLabel"
                )
