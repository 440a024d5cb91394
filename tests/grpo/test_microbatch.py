import pytest
import torch

from nspo_lightning.grpo import Rollout, split_microbatches

GROUP = 4


def make_rollout(prompt_lengths=(5, 2, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompts = len(prompt_lengths)
    lengths = torch.randint(1, 10, (prompts * GROUP,), generator=generator)
    prompt_mask = torch.arange(7) >= 7 - torch.tensor(prompt_lengths)[:, None]
    completion_mask = torch.arange(int(lengths.max()) + 2) < lengths[:, None]  # two columns of padding for all
    ids = torch.arange(1, prompts * GROUP + 1)[:, None].expand_as(completion_mask)
    return Rollout(
        prompt_ids=torch.arange(1, prompts + 1)[:, None].expand_as(prompt_mask) * prompt_mask,
        prompt_mask=prompt_mask,
        group_size=GROUP,
        completion_ids=ids * completion_mask,
        completion_mask=completion_mask,
        finished=lengths < 9,
    )


def cost(micro, share):
    rollout = micro.rollout
    if share:
        return int(rollout.prompt_mask.sum() + rollout.completion_mask.sum())
    return len(rollout.completion_ids) * (rollout.prompt_ids.shape[1] + rollout.completion_ids.shape[1])


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [None, 200, 60, 30, 17, 1])
def test_every_row_once_within_the_budget(share, budget):
    rollout = make_rollout()
    micros = split_microbatches(rollout, budget, share_prefix=share)
    assert sorted(torch.cat([m.rows for m in micros]).tolist()) == list(range(len(rollout.completion_ids)))
    for micro in micros:
        part = micro.rollout
        assert len(part.completion_ids) == 1 or budget is None or cost(micro, share) <= budget
        # Rows still belong to their prompts, and nothing but padding was cut off.
        owner = part.prompt_ids[:, -1].repeat_interleave(part.group_size)
        assert owner.equal(micro.rows // GROUP + 1)
        assert part.completion_ids.equal(micro.take(rollout.completion_ids))
        assert part.completion_mask.sum(1).equal(rollout.completion_mask.sum(1)[micro.rows])
        assert part.finished.equal(rollout.finished[micro.rows])


def test_no_budget_means_one_micro_batch():
    assert len(split_microbatches(make_rollout(), None)) == 1


def test_a_long_group_is_cut_into_as_few_parts_as_fit():
    rollout = make_rollout(prompt_lengths=(5,))
    lengths = rollout.completion_mask.sum(1)
    budget = 5 + int(lengths.sum()) - 1
    assert [len(m.rows) for m in split_microbatches(rollout, budget)] == [GROUP - 1, 1]


def test_take_slices_columns_and_vectors():
    rollout = make_rollout()
    micro = split_microbatches(rollout, 20)[0]
    values = torch.arange(len(rollout.completion_ids))
    assert micro.take(values).equal(micro.rows)
    assert micro.take(rollout.completion_mask).shape == micro.rollout.completion_mask.shape


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1 or None"):
        split_microbatches(make_rollout(), 0)
