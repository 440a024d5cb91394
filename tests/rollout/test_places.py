"""A prompt's place in the batch of all ranks, and that its noise follows it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nspo_lightning.datamodules.sources.order import rank_batches
from nspo_lightning.rollout import SamplingConfig
from nspo_lightning.rollout.places import places, places_among_ranks
from nspo_lightning.rollout.sampler import _noise_of


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_every_place_is_taken_once(counts):
    found = [places(counts, rank) for rank in range(len(counts))]
    assert {place.total for place in found} == {sum(counts)}
    assert sorted(place for one in found for place in one.mine) == list(range(sum(counts)))


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4))
def test_places_are_those_of_the_order_that_the_data_is_dealt_from(rows, batch_size, ranks):
    if rows < ranks:
        return
    dealt = [rank_batches(range(rows), batch_size, rank, ranks) for rank in range(ranks)]
    for step in zip(*dealt, strict=True):
        for rank, batch in enumerate(step):
            mine = places([len(other) for other in step], rank).mine
            first = min(min(other) for other in step)
            assert [first + place for place in mine] == batch


def test_alone_they_count_up():
    assert places_among_ranks(3) == places([3], 0)
    assert places([3], 0).mine == (0, 1, 2)


@pytest.mark.parametrize("counts", [[2, 2], [2, 1], [1, 1, 1]])
def test_ranks_draw_the_noise_that_one_process_draws(counts):
    def draw(where, prompts):
        return _noise_of(where, 5, prompts, 4, SamplingConfig(), torch.Generator().manual_seed(7)).view(5, -1, 4)

    whole = draw(None, sum(counts))
    for rank, count in enumerate(counts):
        where = places(counts, rank)
        assert torch.equal(draw(where, count), whole[:, list(where.mine)])
