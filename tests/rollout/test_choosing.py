import pytest
import torch

from nspo_lightning.rollout import SamplingConfig
from nspo_lightning.rollout.choosing import draw_tokens, noise, without_padding


def test_tokens_are_found_where_the_cumulative_distribution_passes_the_noise():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(5, 3)
    uniform = torch.tensor([0.0, 0.4999, 0.5001, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(logits, uniform, greedy=False).tolist() == [0, 0, 1, 2, 2]


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(1001, 5)
    uniform = torch.linspace(0, 1 - 2**-53, 1001, dtype=torch.float64)
    assert set(draw_tokens(logits, uniform, greedy=False).tolist()) == {1, 3}


def test_greedy_ignores_the_noise():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert draw_tokens(logits, torch.zeros(1, dtype=torch.float64), greedy=True).tolist() == [1]


def test_unlikely_tokens_of_a_large_vocabulary_keep_their_share():
    # One likely token before 100,000 of 1e-9 each: float32 sums would lose them all.
    probabilities = torch.full((1, 100_001), 1e-9, dtype=torch.float64)
    probabilities[0, 0] = 1 - 1e-4
    uniform = torch.tensor([1 - 0.5e-4], dtype=torch.float64)
    token = draw_tokens(probabilities.log().float(), uniform, greedy=False)
    assert 45_000 < int(token) < 55_000


def test_noise_is_the_generators_and_greedy_uses_none():
    a = noise(3, 2, SamplingConfig(), torch.Generator().manual_seed(0))
    b = noise(3, 2, SamplingConfig(), torch.Generator().manual_seed(0))
    assert a.equal(b)
    assert a.dtype == torch.float64
    state = torch.get_rng_state()
    noise(3, 2, SamplingConfig(temperature=0), None)
    assert torch.get_rng_state().equal(state)


def test_padding_repeats_a_token_that_is_there_anyway():
    ids, mask = torch.tensor([[9, 9, 4, 5]]), torch.tensor([[False, False, True, True]])
    assert without_padding(ids, mask).tolist() == [[4, 4, 4, 5]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"min_new_tokens": 300}, "`min_new_tokens` must be in"),
        ({"temperature": -1.0}, "`temperature` must not be negative"),
        ({"top_p": 0.0}, "`top_p` must be in"),
        ({"top_k": -1}, "`top_k` must not be negative"),
        ({"min_p": 1.5}, "`min_p` must be in"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be positive"),
        ({"decoding": "graph"}, "`decoding` must be one of auto, dynamic, static, graphs, got 'graph'"),
        ({"stop_strings": [5]}, "`stop_strings` must be a list of texts"),
        ({"stop_strings": None}, "`stop_strings` must be a list of texts"),
        ({"stop_token_ids": 5}, "`stop_token_ids` must be a list of token ids, got 5"),
        ({"stop_token_ids": None}, "`stop_token_ids` must be a list of token ids, got None"),
        ({"stop_token_ids": ["5"]}, "`stop_token_ids` must be a list of token ids"),
        ({"stop_token_ids": [True]}, "`stop_token_ids` must be a list of token ids"),
        ({"max_new_tokens": 5.5}, "`max_new_tokens` must be a whole number, got 5.5"),
        ({"top_k": None}, "`top_k` must be a whole number, got None"),
        ({"temperature": "1"}, "`temperature` must be a number, got '1'"),
        ({"temperature": float("nan")}, "`temperature` must be a number, got nan"),
        ({"min_p": "0.1"}, "`min_p` must be a number"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**change)
