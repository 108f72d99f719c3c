"""Data sets of the Hugging Face hub, of a folder or of a script's cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..labels.values import check_class_labels


def load_splits(
    source: Mapping[str, Any], split_names: Mapping[str, str | None], columns: Sequence[str]
) -> dict[str, Any]:
    """Splits of a data set as `datasets.Dataset`; downloads them if they are not there.

    Args:
        source: Arguments of `datasets.load_dataset`.
        split_names: Name here to name there; those without one are left out.
        columns: What each split must have.

    Raises:
        FileNotFoundError: No such data set, or the hub cannot be reached.
        ValueError: A split or a column that is not there.
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
