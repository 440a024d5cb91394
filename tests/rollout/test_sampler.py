"""The sampler against HF generate, and the shared path against the plain one."""

import warnings

import pytest
import torch
from tiny_policies import CONFIGS, SHARING, VOCABULARY, ragged_prompts, tiny_policy

from nspo_lightning.policy.scoring import score_completions
from nspo_lightning.rollout import SamplingConfig, sample
from nspo_lightning.rollout.choosing import NonFiniteLogitsError
from nspo_lightning.rollout.memory import RowMemory, SharedMemory

EOS = list(range(5, 15))  # likely enough that rows end at different steps
PAD = 0
LIMIT = 9


def draw(policy, share=True, group=4, seed=1, eos=EOS, prompts=None, with_log_probs=False, stop=None, **settings):
    ids, mask = ragged_prompts() if prompts is None else prompts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return sample(
            policy,
            ids,
            mask,
            group_size=group,
            config=SamplingConfig(**{"max_new_tokens": LIMIT, "temperature": 1.3, **settings}),
            eos_token_ids=eos,
            pad_token_id=PAD,
            generator=torch.Generator().manual_seed(seed),
            share_prefix=share,
            with_log_probs=with_log_probs,
            stop=stop,
        )


def generate(policy, eos=EOS, **kwargs):
    ids, mask = ragged_prompts()
    out = policy.eval().generate(
        input_ids=ids,
        attention_mask=mask.long(),
        do_sample=False,
        max_new_tokens=LIMIT,
        eos_token_id=eos,
        pad_token_id=PAD,
        **kwargs,
    )
    return out[:, ids.shape[1] :]


def assert_same(a, b):
    for name, value in a.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(b, name))), name


@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_tokens_are_those_of_generate(name):
    policy = tiny_policy(name)
    expected = generate(policy)
    for share in (True, False):
        rollout = draw(policy, share, group=2, temperature=0)
        assert rollout.completion_ids[::2].equal(expected)
        assert rollout.completion_ids[1::2].equal(expected)


@pytest.mark.parametrize("name", SHARING)
def test_seeded_samples_are_those_of_the_plain_path(name):
    policy = tiny_policy(name)
    shared, plain = draw(policy), draw(policy, share=False)
    assert_same(shared, plain)
    lengths = shared.completion_mask.sum(1)
    assert len(lengths.unique()) > 1, "rows must end at different steps, or compaction is not tested"


def test_rows_do_not_depend_on_which_others_are_still_running():
    # With no EOS nothing is ever dropped; up to its own EOS each row must be the same.
    policy = tiny_policy()
    free, ending = draw(policy, eos=[]), draw(policy)
    assert free.completion_mask.all()
    assert not free.finished.any()
    width = ending.completion_ids.shape[1]
    assert free.completion_ids[:, :width][ending.completion_mask].equal(ending.completion_ids[ending.completion_mask])


def test_completions_end_at_their_first_eos_and_are_padded_behind():
    rollout = draw(tiny_policy())
    ids, mask = rollout.completion_ids, rollout.completion_mask
    is_eos = torch.isin(ids, torch.tensor(EOS))
    for row, row_mask, row_eos, finished in zip(ids, mask, is_eos, rollout.finished, strict=True):
        length = int(row_mask.sum())
        assert row_mask[:length].all()
        assert bool(finished) == bool(row_eos[length - 1])
        assert not row_eos[: length - 1].any()
        assert row[length:].eq(PAD).all()
    assert rollout.finished.any()
    assert mask.any(0).all(), "the longest completion sets the width"


def test_same_seed_same_tokens_other_seed_others():
    policy = tiny_policy()
    assert_same(draw(policy, seed=3), draw(policy, seed=3))
    assert not draw(policy, seed=3, eos=[]).completion_ids.equal(draw(policy, seed=4, eos=[]).completion_ids)


def test_completions_of_a_group_differ():
    rows = draw(tiny_policy(), eos=[]).completion_ids.view(3, 4, LIMIT)
    assert all(len(group.unique(dim=0)) == 4 for group in rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.3},
        {"repetition_penalty": 1.8},
        {"min_new_tokens": 5},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2, "min_new_tokens": 2},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_each_step_draws_from_the_distribution_of_generate(settings):
    """Teacher-forced: at each step the token must be that of generate's own processor chain at the row's noise."""
    policy = tiny_policy()
    ids, mask = ragged_prompts()
    for share in (True, False):
        rollout = draw(policy, share, **settings)
        uniform = torch.rand(
            LIMIT, len(rollout.completion_ids), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        config = policy.generation_config.__class__(
            do_sample=True, eos_token_id=EOS, pad_token_id=PAD, **{"temperature": 1.3, "top_k": 0, **settings}
        )
        policy.get_base_model()._prepare_special_tokens(config, kwargs_has_attention_mask=True)
        for row in range(len(rollout.completion_ids)):
            prompt = ids[row // 4][mask[row // 4]][None]
            chain = policy.get_base_model()._get_logits_processor(
                config, input_ids_seq_length=prompt.shape[1], device="cpu"
            )
            for step in range(int(rollout.completion_mask[row].sum())):
                so_far = torch.cat([prompt, rollout.completion_ids[row : row + 1, :step]], 1)
                with torch.no_grad():
                    logits = chain(so_far, policy(input_ids=so_far).logits[:, -1].float())
                cumulative = logits.softmax(-1)[0].double().cumsum(0)
                expected = int((cumulative > uniform[step, row] * cumulative[-1]).int().argmax())
                assert int(rollout.completion_ids[row, step]) == expected


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "top_k": 7, "repetition_penalty": 1.2}])
def test_log_probs_of_drawn_tokens_are_those_of_scoring(share, settings):
    """At the temperature alone: what training scores tokens with, whatever processors chose them."""
    policy = tiny_policy()
    rollout = draw(policy, share, with_log_probs=True, **settings)
    temperature = settings.get("temperature", 1.3)
    with torch.no_grad():
        scored = score_completions(policy.eval(), rollout, temperature=temperature).log_probs
    assert scored.shape == rollout.log_probs.shape
    assert not rollout.finished.all()
    assert rollout.finished.any()
    assert (rollout.log_probs - scored).abs().max() <= 1e-5
    assert draw(policy, share, **settings).completion_ids.equal(rollout.completion_ids)


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.8}, {"min_new_tokens": 4}])
def test_greedy_with_processors_equals_generate(settings):
    policy = tiny_policy()
    rollout = draw(policy, group=1, temperature=0, **settings)
    expected = generate(policy, **settings)
    assert rollout.completion_ids.equal(expected)


def test_sampled_frequencies_are_the_probabilities():
    policy = tiny_policy()
    ids, mask = ragged_prompts()
    rollout = draw(policy, group=4000, max_new_tokens=1, prompts=(ids[1:2], mask[1:2]), temperature=1.0)
    counts = torch.bincount(rollout.completion_ids[:, 0], minlength=VOCABULARY)
    with torch.no_grad():
        expected = policy(input_ids=ids[1:2]).logits[0, -1].softmax(-1) * 4000
    chi_square = ((counts - expected).square() / expected).sum()
    assert chi_square < 150  # 96 degrees of freedom: 150 has a probability of 0.0003


def test_each_prompt_runs_once_and_ended_rows_not_at_all():
    policy = tiny_policy()
    rollout = draw(policy)
    tokens = []
    layer = policy.get_base_model().model.layers[0].mlp
    layer.register_forward_pre_hook(lambda _m, args: tokens.append(args[0].shape[:-1].numel()))
    again = draw(policy)
    assert_same(rollout, again)
    assert tokens[0] == int(rollout.prompt_mask.sum())
    # Step t runs the rows whose completion goes on behind token t.
    lengths = rollout.completion_mask.sum(1)
    assert tokens[1:] == [int((lengths > t).sum()) for t in range(1, int(lengths.max()))]


def test_the_policy_comes_back_as_it_was():
    policy = tiny_policy(lora_dropout=0.5)
    policy.train()
    base = policy.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    modes = [module.training for module in policy.modules()]
    first, second = draw(policy), draw(policy, share=False)
    assert_same(first, second)  # no dropout inside, and the cache is not lost to checkpointing
    assert [module.training for module in policy.modules()] == modes
    assert base.config._attn_implementation == "sdpa"


def test_long_completions_outgrow_the_first_buffer():
    policy = tiny_policy()
    assert_same(draw(policy, eos=[], max_new_tokens=70), draw(policy, share=False, eos=[], max_new_tokens=70))


def test_prompts_that_end_in_padding_are_refused():
    ids, mask = ragged_prompts()
    with pytest.raises(ValueError, match="2 of 3 prompts that end in padding"):
        draw(tiny_policy(), prompts=(ids.flip(1), mask.flip(1)))
    with pytest.raises(ValueError, match="at least one prompt"):
        draw(tiny_policy(), prompts=(ids[:0], mask[:0]))


@pytest.fixture(scope="module")
def llama():
    return tiny_policy()


def spoil(monkeypatch, call, change, rows):
    """Change the logits of some rows in one of the calls that sampling makes."""
    calls = []

    def spoilt(real):
        def method(self, *args):
            logits = real(self, *args)
            calls.append(1)
            if len(calls) - 1 == call:
                logits[rows] = change(logits[rows])
            return logits

        return method

    for kind in (SharedMemory, RowMemory):
        for name in ("prefill", "step"):
            monkeypatch.setattr(kind, name, spoilt(getattr(kind, name)))


def one_nan(logits):
    return logits.index_fill(-1, torch.tensor([7]), torch.nan)


SPOILS = {
    "one NaN": one_nan,
    "all NaN": lambda logits: logits * torch.nan,
    "+inf": lambda logits: logits.index_fill(-1, torch.tensor([7]), torch.inf),
    "all -inf": lambda logits: torch.full_like(logits, -torch.inf),
}


WAYS = [{}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.2}]


@pytest.mark.parametrize("name", list(SPOILS))
@pytest.mark.parametrize("call", [0, 3])
@pytest.mark.parametrize("settings", WAYS)
@pytest.mark.parametrize("share", [True, False])
def test_logits_that_say_nothing_are_an_error(llama, monkeypatch, share, settings, call, name):
    """Not the last token, silently."""
    spoil(monkeypatch, call, SPOILS[name], slice(0, 1))
    with pytest.raises(NonFiniteLogitsError, match=f"logits for token {call + 1} of 1 of the 12 .*Likely causes"):
        draw(llama, share=share, eos=[], **settings)


@pytest.mark.parametrize("settings", WAYS)
def test_tokens_at_minus_infinity_are_only_impossible(llama, monkeypatch, settings):
    def most(logits):
        return logits.index_fill(-1, torch.arange(20, VOCABULARY), -torch.inf)

    spoil(monkeypatch, 2, most, slice(None))
    assert bool((draw(llama, eos=[], **settings).completion_ids[:, 2] < 20).all())


def test_a_temperature_that_overflows_is_an_error():
    with pytest.raises(NonFiniteLogitsError):
        draw(tiny_policy(), temperature=1e-45)
