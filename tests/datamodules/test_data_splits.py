"""What is held out and what is chosen: by text and seed, never by position."""

from __future__ import annotations

import json
from typing import Any, cast

import datasets
import pytest

from nspo_lightning.datamodules import AlignmentDataModule, DataError, PromptSource, SafetyDataModule
from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.datamodules.sources.source import Sources
from nspo_lightning.datamodules.sources.splits import choose, held_out_size, hold_out


def rows(count):
    return [
        PromptRow(prompt=f"prompt {i}", skill="s", kind="harmful", source="s", where=f"row {i}") for i in range(count)
    ]


def keys(part):
    return {row.key for row in part}


def write(path, prompts, **columns):
    path.write_text("".join(json.dumps({"prompt": prompt, **columns}) + "\n" for prompt in prompts))
    return str(path)


def test_held_out_rows_do_not_depend_on_the_order_of_the_file():
    forward, backward = (hold_out(part, 10, 10, seed=0)[1] for part in (rows(100), rows(100)[::-1]))
    assert keys(forward["validation"]) == keys(backward["validation"])
    assert keys(forward["test"]) == keys(backward["test"])
    assert keys(forward["test"]) != keys(hold_out(rows(100), 10, 10, seed=1)[1]["test"])


def test_splits_are_disjoint_and_complete_even_when_rows_repeat():
    repeated = rows(50) + rows(50)
    train, held_out = hold_out(repeated, 15, 16, seed=0)  # odd: one of two equal rows is chosen last
    parts = [keys(train), keys(held_out["validation"]), keys(held_out["test"])]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert set().union(*parts) == keys(repeated)


def test_a_smaller_fraction_is_part_of_a_larger_one():
    chosen = {f: keys(choose(rows(1000), PromptSource(path="x", fraction=f))) for f in (0.2, 0.4, 1.0)}
    assert [len(part) for part in chosen.values()] == [200, 400, 1000]
    assert chosen[0.2] < chosen[0.4] < chosen[1.0]
    other_seed = keys(choose(rows(1000), PromptSource(path="x", fraction=0.4, seed=1)))
    assert other_seed != chosen[0.4]


def test_count_takes_all_when_there_are_fewer():
    assert len(choose(rows(5), PromptSource(path="x", count=3))) == 3
    assert len(choose(rows(5), PromptSource(path="x", count=30))) == 5


@pytest.mark.parametrize(
    ("count", "wanted", "size"),
    [(1000, None, 100), (9000, None, 300), (10, None, 1), (4, None, 0), (100, 50, 20), (100, 0, 0)],
)
def test_held_out_size(count, wanted, size):
    assert held_out_size(count, wanted) == size


def test_several_sources_share_what_is_held_out_by_default(tmp_path, tokenizer):
    names, counts = ("a", "b", "c"), (1200, 1200, 400)
    files = [
        write(tmp_path / f"{n}.jsonl", [f"{n} {i}" for i in range(count)])
        for n, count in zip(names, counts, strict=True)
    ]
    loaded = SafetyDataModule([PromptSource(path=file) for file in files], tokenizer=tokenizer).loaded()
    assert len(loaded.test) == len(loaded.validation) == 100 + 100 + 40


def test_fraction_leaves_the_held_out_rows_where_they_are(tmp_path, tokenizer):
    path = write(tmp_path / "x.jsonl", [f"Prompt {i}" for i in range(200)])
    part, whole = (
        SafetyDataModule(PromptSource(path=path, fraction=f), tokenizer=tokenizer).loaded() for f in (0.4, 1.0)
    )
    assert keys(part.test) == keys(whole.test)
    assert len(part.train[0]) == 64
    assert keys(part.train[0]) < keys(whole.train[0])


def test_training_never_sees_the_prompts_of_given_evaluation_files(tmp_path, tokenizer):
    train = write(tmp_path / "train.jsonl", [f"Prompt {i}" for i in range(20)])
    test = write(tmp_path / "test.jsonl", ["Prompt 3", " Prompt 4 ", "Another"])
    data = SafetyDataModule(train, test=test, val_size=0, tokenizer=tokenizer)
    loaded = data.loaded()
    assert len(loaded.test) == 3, "a given file is used whole"
    assert keys(loaded.train[0]) == {f"Prompt {i}" for i in range(20)} - {"Prompt 3", "Prompt 4"}
    assert "2 with a held-out prompt" in loaded.reports[0].line()


def test_a_file_that_is_all_held_out_is_an_error(tmp_path, tokenizer):
    same = write(tmp_path / "x.jsonl", ["a", "b"])
    with pytest.raises(DataError, match="every row is held out"):
        SafetyDataModule(same, test=same, tokenizer=tokenizer).setup()


def test_benign_rows_among_safety_prompts_are_evaluated_as_general(tmp_path, tokenizer):
    safety: Sources = [
        PromptSource(path=write(tmp_path / "bad.jsonl", [f"Bad {i}" for i in range(20)])),
        PromptSource(path=write(tmp_path / "fine.jsonl", [f"Fine {i}" for i in range(20)]), kind="benign", weight=1),
    ]
    general = write(tmp_path / "general.jsonl", [f"Sum {i}" for i in range(20)], answer="1")
    data = AlignmentDataModule(safety, general, batch_size=8, tokenizer=tokenizer)
    harmful, benign = data.eval_rows("test")
    assert {row.kind for row in harmful} == {"harmful"}
    assert {row.skill for row in benign} == {"fine", "general"}
    kinds = [kind for batch in data.train_dataloader() for kind in batch["columns"]["kind"]]
    assert kinds.count("harmful") == kinds.count("benign") == 16


def test_duplicates_are_left_out_and_counted_unless_wanted(tmp_path, tokenizer):
    path = write(tmp_path / "x.jsonl", ["a", "b", " a ", "a"])
    report = SafetyDataModule(path, tokenizer=tokenizer).loaded().reports[0]
    assert dict(report.dropped) == {"with a prompt seen before": 2}
    kept = SafetyDataModule(PromptSource(path=path, deduplicate=False), tokenizer=tokenizer).loaded()
    assert len(kept.train[0]) == 4


def test_a_stream_stops_after_enough_usable_rows(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    write(path, [*(f"A long prompt number {i:03}" for i in range(10)), *(f"p{i}" for i in range(10))])
    path.write_text(path.read_text() + "this line is never read")
    source = PromptSource(path=str(path), streaming=True, count=5)
    data = SafetyDataModule(source, max_prompt_tokens=10, tokenizer=tokenizer)
    loaded = data.loaded()
    assert len(loaded.train[0]) + len(loaded.validation) + len(loaded.test) == 5
    line = loaded.reports[0].line()
    assert "15 rows read, 10 left out (10 longer than 10 tokens)" in line
    assert "stream stopped after 5 usable rows" in line


def test_hub_datasets_are_asked_for_what_the_preset_says(monkeypatch, tokenizer):
    asked = []

    def load_dataset(**arguments):
        asked.append(arguments)
        return datasets.Dataset.from_list([{"question": f"{i}?", "answer": f"#### {i}"} for i in range(10)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = SafetyDataModule(PromptSource(preset="gsm8k", revision="v1"), tokenizer=tokenizer).loaded()
    assert asked[0] == {"path": "openai/gsm8k", "name": "main", "split": "train", "revision": "v1", "streaming": False}
    assert loaded.train[0][0].where.startswith("openai/gsm8k (train), row ")
    assert SafetyDataModule("openai/gsm8k", tokenizer=tokenizer).loaded().train[0][0].source == "gsm8k"


def test_hub_streams_are_shuffled_by_seed(monkeypatch, tokenizer):
    def load_dataset(**arguments):
        assert arguments["streaming"] is True
        return datasets.IterableDataset.from_generator(lambda: ({"prompt": f"p{i}"} for i in range(1000)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def prompts(seed):
        source = PromptSource(path="some/set", streaming=True, count=10, seed=seed)
        return [
            row.prompt
            for row in SafetyDataModule(source, val_size=0, test_size=0, tokenizer=tokenizer).loaded().train[0]
        ]

    assert prompts(0) == prompts(0)
    assert len(prompts(0)) == 10
    assert set(prompts(0)) != set(prompts(1))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("hh_rlhf", {}, {"name": None, "data_dir": "harmless-base", "split": "train"}),
        ("beavertails", {"split": "test"}, {"split": "30k_test"}),
        ("beavertails", {"split": "330k_train"}, {"split": "330k_train"}),
        ("arc", {"name": "ARC-Easy"}, {"name": "ARC-Easy"}),
        ("alpaca_farm", {}, {"revision": "refs/convert/parquet", "split": "eval"}),
        ("ultrachat", {}, {"split": "train_sft"}),
        ("coconot_contrast", {}, {"name": "contrast", "split": "test"}),
        ("coconot_contrast", {"name": "original"}, {"name": "original", "split": "train"}),
    ],
)
def test_hub_names_of_presets(name, options, expected):
    from nspo_lightning.datamodules.sources.hub import hub_arguments
    from nspo_lightning.datamodules.sources.registry import get_preset

    preset = get_preset(name)
    assert preset.hub_id is not None
    arguments = hub_arguments(PromptSource(preset=name, **options), preset, preset.hub_id)
    assert expected.items() <= arguments.items()


def test_a_folder_is_read_by_split_and_files_in_order(tmp_path, tokenizer):
    for name in ("train-00001.jsonl", "train-00000.jsonl", "validation.jsonl", "test set.jsonl"):
        write(tmp_path / name, [name])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")

    def prompts(split):
        source = PromptSource(path=str(tmp_path), split=split)
        return [row.prompt for row in SafetyDataModule(source, tokenizer=tokenizer).loaded().train[0]]

    assert prompts("train") == ["train-00000.jsonl", "train-00001.jsonl"]
    assert prompts("test") == ["test set.jsonl"]
    assert prompts("val") == ["validation.jsonl"]


def test_folders_of_save_to_disk(tmp_path, tokenizer):
    data = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": "a"}])})
    data.save_to_disk(str(tmp_path / "saved"))
    path = str(tmp_path / "saved")
    assert SafetyDataModule(path, tokenizer=tokenizer).loaded().train[0][0].prompt == "a"
    with pytest.raises(DataError, match="no split 'test'; there are 'train'"):
        SafetyDataModule(PromptSource(path=path, split="test"), tokenizer=tokenizer).setup()


def test_chats_and_system_prompts(tmp_path, tokenizer):
    path = tmp_path / "chat.json"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps([{"messages": turns}, {"messages": [{"from": "human", "value": "c"}]}]))
    data = SafetyDataModule(str(path), system_prompt="Be kind.", tokenizer=tokenizer, val_size=0, test_size=0)
    first, second = data.loaded().train[0]
    assert first.answer == "b"
    assert first.prompt == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}]
    batch = data.eval_loader([second])
    ids, mask = (next(iter(batch))[name] for name in ("prompt_ids", "prompt_mask"))
    assert tokenizer.decode(ids[mask]) == "<|system|>Be kind.<|end|><|user|>c<|end|><|assistant|>"


def test_rows_from_a_function(tokenizer):
    def world(split):
        return [{"prompt": f"{split} {i}", "skill": "talk", "extra": i} for i in range(10)]

    loaded = SafetyDataModule(PromptSource(rows=world), tokenizer=tokenizer).loaded()
    assert loaded.train[0][0].skill == "talk"
    assert loaded.train[0][0].columns == {"extra": 0}
    with pytest.raises(DataError, match="row 1: a row must be a dict"):
        SafetyDataModule(
            PromptSource(rows=lambda split: cast("list[dict[str, Any]]", ["a"])), tokenizer=tokenizer
        ).setup()


def test_a_built_in_world_brings_its_own_splits(tokenizer):
    data = AlignmentDataModule("toy/harmful", "toy/general", val_size=50, tokenizer=tokenizer)
    harmful, benign = data.eval_rows("validation")
    assert len(harmful) == 50
    assert len(benign) == 50
    train = {row.key for part in (data.safety, data.general) for row in part.loaded().train[0]}
    for split in ("validation", "test"):
        assert not train & {row.key for part in data.eval_rows(split) for row in part}
