"""The datamodule as LightningCLI's schema: dotted overrides, bare paths, lists, a printed config that parses again."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from nspo_lightning.datamodules import AlignmentDataModule, PromptSource, preset_names
from nspo_lightning.datamodules.sources.source import as_sources

QUICKSTART = {
    "data": {
        "safety": {"path": "toy", "name": "harmful", "fraction": 0.4},
        "general": [{"path": "a.jsonl", "weight": 2.0}, "b.json"],
        "batch_size": 12,
    }
}


class Bare(pl.LightningModule):
    pass


@pytest.fixture
def parse(tmp_path, monkeypatch):
    def run(*arguments, config=QUICKSTART):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        monkeypatch.setattr("sys.argv", ["prog", "--config", str(path), *arguments])
        return LightningCLI(Bare, AlignmentDataModule, run=False, save_config_callback=None)

    return run


def sources(data):
    return data.safety.sources.train, data.general.sources.train


def test_a_file_of_sources(parse):
    safety, general = sources(parse().datamodule)
    assert safety == [PromptSource(path="toy", name="harmful", fraction=0.4)]
    assert general == [PromptSource(path="a.jsonl", weight=2.0), PromptSource(path="b.json")]


def test_overrides_from_the_command_line(parse):
    arguments = ("--data.safety.path=x.csv", '--data.general=["y.jsonl", {"path": "z.json", "preset": "alpaca"}]')
    safety, general = sources(parse(*arguments, "--data.batch_size=4").datamodule)
    assert safety == [PromptSource(path="x.csv", name="harmful", fraction=0.4)]
    assert general == [PromptSource(path="y.jsonl"), PromptSource(path="z.json", preset="alpaca")]
    safety, _ = sources(parse("--data.safety=x.csv").datamodule)
    assert safety == [PromptSource(path="x.csv")], "a bare path replaces the whole source"


def test_a_function_by_its_import_path(parse):
    safety, _ = sources(
        parse("--data.safety.path=null", "--data.safety.rows=nspo_lightning.datamodules.preset_names").datamodule
    )
    assert safety[0].rows is preset_names


def test_the_printed_config_parses_to_the_same(parse, capsys, tmp_path):
    first = parse()
    text = first.parser.dump(first.config)
    second = parse(config=yaml.safe_load(text))
    assert sources(first.datamodule) == sources(second.datamodule)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--data.safety.colour=red", "colour"),
        ("--data.safety.bad_rows=ignore", "bad_rows"),
        ("--data.calibration_text=answers", "calibration_text"),
        ("--data.mixture=random", "mixture"),
    ],
)
def test_wrong_values_are_named(parse, capsys, argument, message):
    with pytest.raises(SystemExit) as caught:
        parse(argument)
    assert caught.value.code != 0
    assert message in capsys.readouterr().err


def test_values_out_of_range_are_one_line(parse):
    with pytest.raises(ValueError, match=r"^toy: `fraction` must be in \(0, 1\], got 1.4. Use 0.4 for 40 %.$"):
        parse("--data.safety.fraction=1.4")


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"eval_batch_size": 0},
        {"max_prompt_tokens": 0},
        {"repeat_batches": 0},
        {"calibration_size": 0},
    ],
)
def test_sizes_below_one_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        AlignmentDataModule("a", "b", **options)


def test_sources_must_be_paths_or_sources():
    with pytest.raises(ValueError, match="`safety` is an empty list"):
        as_sources([], "safety")
    with pytest.raises(TypeError, match="`safety` must hold paths or PromptSource entries, got int"):
        as_sources([3], "safety")  # type: ignore[list-item]
