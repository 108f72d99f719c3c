"""The data that a net was trained on, or others, for a net that is back to life."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from ..cli.early import find_config
from .restored import Restored


def data_for(restored: Restored, config: str | None = None) -> Any:
    """A data module after `setup`, with the net's image size or tokenizer.

    Args:
        restored: The net.
        config: A shipped config's name, a file, or the folder of a run, of which only `data` counts; by default that
            of the run that wrote the checkpoint, split as it was then.

    Raises:
        FileNotFoundError: There is no such config; the checkpoint lies elsewhere; the data are gone.
        ValueError: The data are not those of the run any more; the config names none.
    """
    if config is None and restored.run is None:
        raise FileNotFoundError("the checkpoint has been moved away from its run's config.yaml")
    folder = restored.run if config is None else Path(config)
    file = folder / "config.yaml" if folder is not None and folder.is_dir() else find_config(str(config))
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "data" not in content:
        raise ValueError(f"{file} names no data: expected a section data: with class_path and init_args")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    data: Any = parser.instantiate_classes(parser.parse_object({"data": content["data"]})).data
    if restored.reads == "vision":
        data.image_size = restored.image_size
    else:
        data.tokenizer = restored.tokenizer
    if config is not None:
        data.prepare_data()
    data.setup("fit")
    if config is None:
        data.load_state_dict(restored.data)
    return data
