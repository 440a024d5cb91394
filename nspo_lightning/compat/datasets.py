"""What `datasets` has no public name for: which columns open files when a row is read."""

from __future__ import annotations

from typing import Any


def opens_files(feature: Any) -> bool:
    """Whether decoding a column opens files: images, sounds, videos and whatever else has a decoder of its own.

    `decode_example` marks such features (datasets 4.0 to 5.2). `Json`, which is newer than 4.0, has it too, but only
    parses text. Lists and structures are searched for what they hold.

    Args:
        feature: The column's type, as in `Dataset.features`.

    Returns:
        True for columns that must not be read.
    """
    from datasets import LargeList, List, features

    if isinstance(feature, dict):
        return any(opens_files(inner) for inner in feature.values())
    if isinstance(feature, (list, tuple)):
        return any(opens_files(inner) for inner in feature)
    if isinstance(feature, (List, LargeList)):
        return opens_files(feature.feature)
    return hasattr(feature, "decode_example") and not isinstance(feature, getattr(features, "Json", ()))
