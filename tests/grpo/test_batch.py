import pytest
import torch

from nspo_lightning.grpo import Rollout


def make():
    return Rollout(
        prompt_ids=torch.arange(6).view(2, 3),
        prompt_mask=torch.tensor([[False, True, True], [False, False, True]]),
        group_size=2,
        completion_ids=torch.arange(16).view(4, 4),
        completion_mask=torch.arange(4) < torch.tensor([1, 2, 3, 1])[:, None],
        finished=torch.tensor([True, False, True, True]),
        log_probs=-torch.arange(16.0).view(4, 4),
    )


@pytest.mark.parametrize("index", [[1], slice(1, None), torch.tensor([1]), torch.tensor([False, True])])
def test_select_keeps_whole_groups(index):
    part = make().select(index)
    assert (part.num_prompts, len(part.completion_ids)) == (1, 2)
    assert part.prompt_ids.tolist() == [[3, 4, 5]]
    assert part.completion_ids[:, 0].tolist() == [8, 12]
    assert part.finished.tolist() == [True, True]
    assert part.log_probs[:, 0].tolist() == [-8, -12]


def test_trim_cuts_common_padding_only():
    rollout = make().trim()
    assert rollout.prompt_ids.tolist() == [[1, 2], [4, 5]]
    assert rollout.completion_ids.shape == rollout.log_probs.shape == (4, 3)
    assert rollout.completion_mask.sum() == make().completion_mask.sum()


def test_whole_rows_have_each_prompt_before_its_completions():
    ids, mask = make().whole_rows()
    assert ids.tolist() == [
        [0, 1, 2, 0, 1, 2, 3],
        [0, 1, 2, 4, 5, 6, 7],
        [3, 4, 5, 8, 9, 10, 11],
        [3, 4, 5, 12, 13, 14, 15],
    ]
    assert mask.int().tolist() == [
        [0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 0, 0, 0],
    ]


def test_state_dict_holds_plain_values_and_comes_back():
    state = make().state_dict()
    assert all(isinstance(value, (torch.Tensor, int)) for value in state.values())
    again = Rollout(**state)
    for name, value in make().state_dict().items():
        assert torch.equal(torch.as_tensor(getattr(again, name)), torch.as_tensor(value))


def test_to_moves_every_tensor():
    moved = make().to("meta")
    assert {t.device.type for t in moved.state_dict().values() if isinstance(t, torch.Tensor)} == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 3}, "need 6 completion rows"),
        ({"finished": torch.ones(3, dtype=torch.bool)}, "as many `finished` flags"),
        ({"prompt_mask": torch.ones(2, 2, dtype=torch.bool)}, "must have the same shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Rollout(**make().state_dict() | change)
