"""What `compat/datasets.py` relies on: a failure here names the part of `datasets` that changed."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from datasets import features

from nspo_lightning.compat.datasets import SAVED_INDICES, opens_files, saved_parts

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


def test_the_indices_of_a_saved_dataset_name_all_of_its_parts(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"prompt": ["a"]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path))
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.name in SAVED_INDICES)
    looked_at = "`save_to_disk` writes other indices now: see datasets.arrow_dataset and mend `saved_parts`"
    assert found == ["dataset_dict.json", "test/state.json", "train/state.json"], looked_at
    assert saved_parts(tmp_path / "dataset_dict.json") == [tmp_path / "train", tmp_path / "test"], looked_at
    assert saved_parts(tmp_path / "train" / "state.json") == sorted((tmp_path / "train").glob("*.arrow")), looked_at
