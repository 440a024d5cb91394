"""Which rows an epoch visits: shares, permutations, ranks, and a place that can be saved."""

from __future__ import annotations

from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nspo_lightning.datamodules import AlignmentDataModule, DataError
from nspo_lightning.datamodules.loader import PromptLoader
from nspo_lightning.datamodules.sources.order import batch_count, epoch_order, mixture_sizes, rank_batches, shares
from nspo_lightning.datamodules.sources.rows import PromptRow

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def rows(count, start=0):
    return [
        PromptRow(prompt=f"prompt {i}", skill="s", kind="harmful", source="s", where=f"row {i}")
        for i in range(start, start + count)
    ]


def loader(sources, **options):
    return PromptLoader(sources, lambda part: {"prompt": [row.prompt for row in part]}, **{"batch_size": 4, **options})


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 1000))
def test_shares_add_up_and_stay_within_one_of_the_exact_part(weights, total):
    whole = shares(weights, total)
    assert sum(whole) == total
    for part, weight in zip(whole, weights, strict=True):
        assert abs(part - weight / sum(weights) * total) < 1 + 1e-6


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 5))
def test_ranks_share_every_row_once_in_equally_many_batches(count, batch_size, world_size):
    if count < world_size:
        with pytest.raises(ValueError, match="cannot feed"):
            rank_batches(range(count), batch_size, 0, world_size)
        return
    parts = [rank_batches(range(count), batch_size, rank, world_size) for rank in range(world_size)]
    assert sorted(row for part in parts for batch in part for row in batch) == list(range(count))
    assert {len(part) for part in parts} == {batch_count(count, batch_size, world_size)}
    assert all(0 < len(batch) <= batch_size + 1 for part in parts for batch in part)
    if world_size == 1:
        assert all(len(batch) <= batch_size for batch in parts[0])


@given(SIZES, st.integers(0, 5), st.integers(0, 3))
def test_one_source_is_visited_whole_every_epoch(sizes, seed, epoch):
    order = epoch_order(sizes[:1], [1.0], seed=seed, epoch=epoch)
    assert sorted(order) == list(range(sizes[0]))


@settings(max_examples=50)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 4))
def test_mixtures_keep_their_weights_and_neglect_no_row(small, large, weight):
    sizes, weights = [small, large], [float(weight), 1.0]
    take = mixture_sizes(sizes, weights, "shortest")
    assert take[0] <= small + 1
    assert take[1] <= large + 1
    epochs = 2 * (small + large)
    seen = Counter(i for epoch in range(epochs) for i in epoch_order(sizes, weights, seed=0, epoch=epoch))
    for start, size in ((0, small), (small, large)):
        counts = [seen[i] for i in range(start, start + size)]
        assert max(counts) - min(counts) <= 1, "over epochs, rows of one source are visited equally often"


def test_mixture_ends_with_the_shortest_or_the_longest_source():
    assert mixture_sizes([100, 10], [1, 1], "shortest") == [10, 10]
    assert mixture_sizes([100, 10], [1, 1], "longest") == [100, 100]
    assert mixture_sizes([100, 10], [3, 1], "shortest") == [30, 10]


def test_epochs_and_seeds_differ_but_repeat_exactly():
    def order(seed, epoch):
        return epoch_order([50], [1.0], seed=seed, epoch=epoch)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(5) for epoch in range(5)}) == 25


def test_a_large_source_gives_other_rows_in_every_cycle():
    def visited(epoch):
        return {i for i in epoch_order([3, 30], [1.0, 1.0], seed=0, epoch=epoch) if i >= 3}

    assert len({frozenset(visited(epoch)) for epoch in range(20)}) == 20  # a cycle is ten epochs of three rows


def test_a_new_epoch_starts_at_its_first_batch():
    built = loader([rows(8)], shuffle=True)
    list(built)
    built.place.set_epoch(1)
    assert (built.state_dict()["epoch"], built.state_dict()["batch"]) == (1, 0)


@pytest.mark.parametrize("stop_after", [0, 1, 5, 11, 12])
def test_a_saved_place_goes_on_where_it_was(stop_after):
    whole = [batch["prompt"] for batch in loader([rows(22)], shuffle=True, repeat_batches=2)]
    assert len(whole) == 12
    assert whole[0] == whole[1] != whole[2]
    first = loader([rows(22)], shuffle=True, repeat_batches=2)
    iterator = iter(first)
    given_out = [next(iterator)["prompt"] for _ in range(stop_after)]
    second = loader([rows(22)], shuffle=True, repeat_batches=2)
    second.load_state_dict(first.state_dict())
    assert given_out + [batch["prompt"] for batch in second] == whole
    assert [batch["prompt"] for batch in second] == whole, "a restored place counts once"


@pytest.mark.parametrize("repeat", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_repeated_batches_come_in_blocks_of_a_window(repeat, window):
    options = {"shuffle": True, "repeat_batches": repeat, "window": lambda: window}
    once = [batch["prompt"] for batch in loader([rows(22)], shuffle=True)]
    built = loader([rows(22)], **options)
    given = list(built)
    assert len(given) == len(built)
    if repeat == 1:
        assert [batch["prompt"] for batch in given] == once
        return
    size = window * repeat
    for start in range(0, len(given), size):
        first = start // repeat
        expected = once[first : first + window]
        expected += [[]] * (window - len(expected))
        assert [batch["prompt"] for batch in given[start : start + size]] == expected * repeat
    numbers = [batch.get("batch_number") for batch in given if batch["prompt"]]
    assert numbers == [None] * len(numbers) if window == 1 else set(numbers) == set(range(len(once)))


@pytest.mark.parametrize("stop_after", range(17))
def test_a_place_in_a_block_goes_on_where_it_was(stop_after):
    options = {"shuffle": True, "repeat_batches": 2, "window": lambda: 4}
    whole = list(loader([rows(22)], **options))
    assert len(whole) == 16
    first, second = loader([rows(22)], **options), loader([rows(22)], **options)
    iterator = iter(first)
    given_out = [next(iterator) for _ in range(stop_after)]
    second.load_state_dict(first.state_dict())
    assert given_out + list(second) == whole


def test_numbers_of_batches_are_those_of_all_epochs():
    built = loader([rows(8)], repeat_batches=2, window=lambda: 2)
    assert [batch["batch_number"] for batch in built] == [0, 1, 0, 1]
    built.place.set_epoch(1)
    assert [batch["batch_number"] for batch in built] == [2, 3, 2, 3]


def test_a_place_of_before_there_were_blocks_is_that_of_a_window_of_one():
    state = loader([rows(22)], repeat_batches=2).state_dict() | {"batch": 3}
    del state["window"]
    loader([rows(22)], repeat_batches=2).load_state_dict(state)
    loader([rows(22)], repeat_batches=1, window=lambda: 2).load_state_dict(state | {"repeat_batches": 1})
    with pytest.raises(DataError, match=r"`trainer.accumulate_grad_batches` changed since \(window 1 -> 2\)"):
        loader([rows(22)], repeat_batches=2, window=lambda: 2).load_state_dict(state)


def test_a_place_in_other_data_is_refused():
    first = loader([rows(22)])
    next(iter(first))
    state = first.state_dict()
    for other, name in (
        (loader([rows(21)]), "the training rows"),
        (loader([rows(22)], batch_size=3), "`batch_size`"),
        (loader([rows(22)], repeat_batches=2), "`repeat_batches`"),
        (loader([rows(22)], seed=1), "the data seed"),
        (loader([rows(22)], shard=lambda: (0, 2)), "the number of devices"),
    ):
        with pytest.raises(DataError, match=f"within an epoch, and {name} changed(.|\n)*new run"):
            other.load_state_dict(state)
    finished = {**state, "batch": 6}
    loader([rows(22)], seed=1).load_state_dict(finished)  # at the end of an epoch nothing can be doubled or lost


def test_state_is_plain_values():
    state = loader([rows(5)]).state_dict()
    assert all(isinstance(value, (int, str)) for value in state.values())


def test_length_counts_what_iteration_gives():
    for options in ({"shuffle": True}, {"shuffle": True, "stop": "longest"}, {"repeat_batches": 3}):
        for world_size in (1, 2, 3):
            built = loader([rows(23), rows(7, 100)], shard=lambda n=world_size: (n - 1, n), **options)
            assert len(list(built)) == len(built)


class RankRecorder(pl.LightningModule):
    """Writes the prompts of each step to a file per rank."""

    def __init__(self, tokenizer, folder):
        super().__init__()
        self.tokenizer, self.folder = tokenizer, folder
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        self.write("train", batch)
        return (self.weight**2).sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.write(f"val{dataloader_idx}", batch)

    def write(self, name, batch):
        with (self.folder / f"{name}-{self.global_rank}.txt").open("a") as stream:
            stream.write("\t".join(batch["prompt"]) + "\n")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("strategy", ["ddp_fork"])
def test_two_ranks_share_rows_without_doubling_or_loss(tmp_path, tokenizer, strategy):
    for name, count in (("harmful", 31), ("general", 23)):
        (tmp_path / f"{name}.csv").write_text("prompt\n" + "".join(f"{name} {i}\n" for i in range(count)))
    data = AlignmentDataModule(
        str(tmp_path / "harmful.csv"), str(tmp_path / "general.csv"), batch_size=4, eval_batch_size=2
    )
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(RankRecorder(tokenizer, tmp_path), datamodule=data)
    for name in ("train", "val0", "val1"):
        steps = [(tmp_path / f"{name}-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
        assert len(steps[0]) == len(steps[1])
        seen = [prompt for part in steps for line in part for prompt in line.split("\t")]
        assert len(seen) == len(set(seen)), "no row twice"
        assert len(seen) == {"train": 25, "val0": 3, "val1": 2}[name], "no row lost"


@given(st.integers(3, 30), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.data())
@settings(max_examples=60, deadline=None)
def test_rows_on_demand_come_once_a_pass_and_go_on_from_any_place(count, batch_size, repeat, window, world_size, data):
    """A run that takes further rows now and then, and one that is broken off in a batch and goes on."""
    wanted: dict[tuple[int, int], int] = {}  # further rows by the number of the batch, the same whoever asks
    unfinished = [0]

    def start(rank):
        made = loader(
            [rows(count)],
            batch_size=batch_size,
            shuffle=True,
            repeat_batches=repeat,
            window=lambda: window,
            shard=lambda: (rank, world_size),
            unfinished=lambda: unfinished[0],
        )
        made.on_demand = True
        return made

    def run(made, seen, epochs, stop_at=None):
        for epoch in range(made.place.epoch, epochs):
            made.batch_sampler.sampler.set_epoch(epoch)
            for batch in made:
                taken = list(batch["prompt"])
                seen.append(taken)
                new = (made.place.given - 1) % (made.window * repeat) < made.window
                if taken and new:
                    number = wanted.setdefault((epoch, made.place.given), data.draw(st.integers(0, 3)))
                    taken += made.more(number)["prompt"] if number else []
                if len(seen) == stop_at:
                    return
            assert made.place.given == len(made)

    ranks: list[list[list[str]]] = [[] for _ in range(world_size)]
    for rank, seen in enumerate(ranks):
        made = start(rank)
        run(made, seen, 2)
    steps = len(ranks[0])
    block = window * repeat if repeat > 1 else 1
    new = [i for i in range(steps) if i % len(start(0)) % block < max(block // repeat, 1)]
    dealt = []
    for together in ([seen[i] for seen in ranks] for i in new):
        batch = [row for turn in zip(*together, strict=True) for row in turn]
        assert len(set(batch)) == len(batch), "no row twice in a batch"
        dealt += batch
    for i in (i for i in new if ranks[0][i]):
        asked = batch_size + wanted[i // len(made), i % len(made) + 1]
        assert [len(seen[i]) for seen in ranks] == [min(asked, count // world_size)] * world_size
    order = epoch_order([count], [1.0], seed=0, epoch=0)
    assert dealt[:count] == [f"prompt {i}" for i in order][: len(dealt)], "no row of a pass lost"
    passes = -(-made.place.taken // count)
    assert max(Counter(dealt).values()) <= passes, "no row twice in a pass"
    stop = data.draw(st.integers(1, steps))
    broken, seen = start(0), []
    run(broken, seen, 2, stop_at=stop)
    unfinished[0] = data.draw(st.integers(0, 1))
    state, unfinished[0] = broken.state_dict(), 0
    again, rest = start(0), list[list[str]]()
    again.load_state_dict(state)
    again.place.epoch = state["epoch"]
    if state["batch"] == len(again):  # Lightning begins the next epoch then
        again.batch_sampler.sampler.set_epoch(state["epoch"] + 1)
    run(again, rest, 2)
    assert rest == ranks[0][stop - int(state["batch"] < broken.place.given) :]
