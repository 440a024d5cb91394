"""What `datasets` has no public name for: the index of a saved dataset, and which columns open files when read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SAVED_INDICES = ("dataset_dict.json", "state.json")
"""What `save_to_disk` writes into the folder of a DatasetDict and into that of a Dataset."""


def saved_parts(index: Path) -> list[Path]:
    """Return the files or folders that an index of a saved dataset (one of `SAVED_INDICES`) names.

    They are as they are written there, seen from the index's folder, and may lead anywhere.
    """
    content = json.loads(index.read_text("utf-8"))
    if index.name == "state.json":
        return [index.parent / entry["filename"] for entry in content["_data_files"]]
    return [index.parent / name for name in content["splits"]]


def opens_files(feature: Any) -> bool:
    """Return whether decoding a column opens files: images, sounds, videos and whatever has a decoder of its own.

    The feature is the column's type, as in `Dataset.features`. `decode_example` marks such types (datasets 4.0 to 5.2).
    `Json`, which is newer than 4.0, has it too, but only parses text. Lists and structures are searched.
    """
    from datasets import LargeList, List, features

    if isinstance(feature, dict):
        return any(opens_files(inner) for inner in feature.values())
    if isinstance(feature, (list, tuple)):
        return any(opens_files(inner) for inner in feature)
    if isinstance(feature, (List, LargeList)):
        return opens_files(feature.feature)
    return hasattr(feature, "decode_example") and not isinstance(feature, getattr(features, "Json", ()))
