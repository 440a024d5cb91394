"""What `compat/datasets.py` relies on: a failure here names the part of `datasets` that changed."""

from __future__ import annotations

import datasets
import pytest
from datasets import features

from nspo_lightning.compat.datasets import opens_files

PLAIN = ("Value", "ClassLabel", "Array2D", "Translation", "TranslationVariableLanguages", "Json")
BUILT = {
    "Value": lambda: datasets.Value("string"),
    "ClassLabel": lambda: datasets.ClassLabel(names=["a"]),
    "Array2D": lambda: datasets.Array2D((1, 1), "int8"),
    "Translation": lambda: datasets.Translation(["de"]),
}


@pytest.mark.parametrize("name", [name for name in PLAIN if hasattr(features, name)])
def test_columns_of_text_and_numbers_open_no_files(name: str) -> None:
    feature = BUILT.get(name, getattr(features, name))()
    assert not opens_files(feature), f"datasets.features.{name} has a decoder now: see datasets.features.features"
    assert not opens_files({"a": [feature]})


@pytest.mark.parametrize("name", ["Image", "Audio", "Video", "Pdf"])
def test_columns_of_media_open_files(name: str) -> None:
    decoder = getattr(features, name)
    assert hasattr(decoder, "decode_example"), (
        f"datasets.features.{name} has no `decode_example` any more: see how `decode_nested_example` in "
        "datasets.features.features tells columns that are decoded, and mend `opens_files`"
    )
    feature = decoder()
    for nested in (feature, [feature], {"a": feature}, datasets.List(feature), datasets.LargeList({"a": feature})):
        assert opens_files(nested)
