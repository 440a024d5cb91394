"""The penalty on general text and the projection of gradients: what they do to a step, and that runs go on exactly."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_jobs import Recorder, adapter, datamodule, general, harmful, module, trainer

from nspo_lightning.callbacks import OGPSA, CurvatureAnchor, ExactResume, GeneralKL, NullSpaceProjection
from nspo_lightning.callbacks.ogpsa import by_skill, orthonormal, remove_
from nspo_lightning.callbacks.pull_text import split_starts, text_to_pull_by, together
from nspo_lightning.callbacks.text_gradients import mean_gradients, microbatches
from nspo_lightning.datamodules import AlignmentDataModule, PromptSource
from nspo_lightning.nullspace import TO_LEARN
from nspo_lightning.nullspace.domains import starts_of
from nspo_lightning.nullspace.projection import apply
from nspo_lightning.policy.settings import PolicySettings


class Watched(pl.Callback):
    """Notes gradients before and after the callbacks between the two of its kind, and the weights."""

    def __init__(self):
        self.seen, self.weights = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.weights.append(adapter(pl_module))
        self.seen.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def with_starts():
    """Data of which some general rows are not calibrated on: the starts of the policy's answers to them can be."""
    return AlignmentDataModule(
        PromptSource(rows=harmful), PromptSource(rows=general), calibration_size=4, calibration_starts=3, batch_size=2
    )


def fit(path, folder, callbacks, steps, checkpoint=None, data=datamodule, **options):
    pl.seed_everything(3)
    policy = module(path)
    run = trainer(folder, steps, callbacks=callbacks, **options)
    run.fit(policy, data(), ckpt_path=checkpoint, weights_only=checkpoint is not None)
    return run, policy


@pytest.fixture(scope="module")
def penalised(tiny_llama, tmp_path_factory):
    """Three updates with a penalty, seen before and after it, and the whole text each time."""
    before, after, penalty = Watched(), Watched(), GeneralKL(coefficient=2.0, rows=8)
    folder = tmp_path_factory.mktemp("penalty")
    run, policy = fit(tiny_llama, folder, [before, penalty, after, ExactResume()], 3)
    return run, policy, penalty, before, after


def test_the_penalty_adds_the_gradient_of_the_mean_kl_on_the_calibration_text(penalised):
    _run, policy, penalty, before, after = penalised
    named = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    tensors = [part for batch in penalty._batches for part in batch.values() if isinstance(part, torch.Tensor)]
    assert policy.base_states_bytes > 0
    assert penalty.held_bytes() == sum(part.nbytes for part in tensors) + policy.base_states_bytes
    # Of a fresh adapter, which is the base, there is nothing to pull at.
    assert all(torch.allclose(before.seen[0][n], after.seen[0][n], atol=1e-5) for n in named)
    # What the third update was given, by hand at the weights that it began with: twice the mean over its rows' tokens.
    policy.load_state_dict(after.weights[2], strict=False)
    batches = penalty.batches_of(2)
    total, tokens = 0.0, 0
    for batch in batches:
        scores = policy.text_scores({k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")})
        total, tokens = total + scores.kl, tokens + scores.tokens
    gradients, value = mean_gradients(policy, batches, "kl", list(named.values()), policy.device)
    assert value == pytest.approx(total / tokens, rel=1e-3)
    for name, gradient in zip(named, gradients, strict=True):
        added = after.seen[2][name] - before.seen[2][name]
        assert torch.allclose(added, 2.0 * gradient, rtol=1e-3, atol=1e-6)
    # And it is the slope of that mean.
    start = {n: p.detach().clone() for n, p in named.items()}
    along = sum(float((g * g).sum()) for g in gradients)
    with torch.no_grad():
        for parameter, gradient in zip(named.values(), gradients, strict=True):
            parameter -= 3e-3 / along**0.5 * gradient
    _, lower = mean_gradients(policy, batches, "kl", list(named.values()), policy.device)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(start[name])
    assert value - lower == pytest.approx(3e-3 * along**0.5, rel=0.2)


def test_the_rows_are_taken_in_turn(penalised):
    _, _, penalty, _, _ = penalised
    assert len(penalty._batches) > 0
    penalty._batches = [{"input_ids": torch.zeros(4, 2), "number": n} for n in range(3)]
    taken = [[batch["number"] for batch in penalty.batches_of(update)] for update in range(3)]
    assert taken == [[0, 1], [2, 0], [1, 2]]


def test_with_a_weight_the_penalty_sees_the_starts_of_the_policys_own_answers(tiny_llama, tmp_path):
    before, after, penalty = Watched(), Watched(), GeneralKL(coefficient=2.0, rows=4, start_weight=0.25)
    _, policy = fit(tiny_llama, tmp_path, [before, penalty, after], 2, data=with_starts)
    named = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    policy.load_state_dict(after.weights[1], strict=False)
    # No row of text is a start, and nobody answered a prompt that is to be learnt.
    assert {d for batch in penalty._batches for d in batch["domain"]} == {"say"}
    assert len(penalty._starts) == 3
    assert sum(len(prompts) for prompts, _ in policy.base_answers.known) == 3
    # Scored is what stands behind the prompt alone: three tokens of an answer, by the scores of their rows.
    scores = [policy.text_scores(batch) for batch in penalty.starts_of(1)]
    assert {row.tokens for found in scores for row in found.rows} == {3}
    text = mean_gradients(policy, penalty.batches_of(1), "kl", list(named.values()), policy.device)
    starts = mean_gradients(policy, penalty.starts_of(1), "kl", list(named.values()), policy.device)
    assert starts[1] == pytest.approx(sum(found.kl for found in scores) / sum(found.tokens for found in scores))
    assert penalty.kl == pytest.approx(0.75 * text[1] + 0.25 * starts[1], rel=1e-3)
    for name, of_text, of_starts in zip(named, text[0], starts[0], strict=True):
        added = after.seen[1][name] - before.seen[1][name]
        assert torch.allclose(added, 2.0 * (0.75 * of_text + 0.25 * of_starts), rtol=1e-3, atol=1e-6)


class Kept(pl.Callback):
    """Keeps what an anchor measured, which it gives back after the run."""

    def __init__(self, anchor):
        self.anchor = anchor

    def on_train_end(self, trainer, pl_module):
        self.terms = list(self.anchor._terms)
        self.bytes = self.anchor.held_bytes()


@pytest.fixture(scope="module")
def anchored(tiny_llama, tmp_path_factory):
    """Four updates with an anchor, seen before and after it, and beside a null space, which comes later."""
    before, after, anchor = Watched(), Watched(), CurvatureAnchor(coefficient=30.0, start_weight=0.25)
    kept = Kept(anchor)
    hold = NullSpaceProjection(criterion="null_share", threshold=0.5)
    log, last = Recorder(), Watched()
    _, policy = fit(
        tiny_llama,
        tmp_path_factory.mktemp("anchor"),
        [before, anchor, after, hold, last, log, kept],
        4,
        data=with_starts,
    )
    leak = max(hold.certificate().values())  # tests change the weights
    assert anchor.held_bytes() == 0, "given back"
    return policy, (anchor, kept.terms), before, after, last, (hold, leak), log


def test_the_anchor_adds_the_gradient_of_what_it_foretells(anchored):
    policy, (anchor, terms), before, after, _, _, log = anchored
    named = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert [share for share, _ in terms] == [0.75, 0.25]
    policy.load_state_dict(after.weights[3], strict=False)
    expected = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    total = 0.0
    for share, curvature in terms:
        kl, gradients = curvature.pull()
        total += share * float(kl)
        for name, parameter in named.items():
            expected[name] += 30.0 * share * gradients[parameter]
    assert total > 0
    assert float(anchor.kl) == pytest.approx(total, rel=1e-5)
    assert log.steps[-1]["curvature_anchor/kl"] == pytest.approx(total, rel=1e-5)
    for name, pull in expected.items():
        assert torch.allclose(after.seen[3][name] - before.seen[3][name], pull, rtol=1e-3, atol=1e-6)


def test_what_the_anchor_foretells_is_the_kl_on_its_text(anchored):
    """Of random small updates on average, on the very text, starts and all."""
    policy, (_, terms), *_ = anchored
    text, starts = text_to_pull_by(policy.trainer, policy, "here", 0.25)
    named = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(30):
        with torch.no_grad():
            for parameter in named.values():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        found = [
            sum(s.kl for s in scores) / sum(s.tokens for s in scores)
            for scores in ([policy.text_scores(_asked(b)) for b in part] for part in (text, together(starts)))
        ]
        ratios.append((0.75 * found[0] + 0.25 * found[1]) / sum(w * float(c.pull()[0]) for w, c in terms))
    assert torch.tensor(ratios).mean() == pytest.approx(1.0, abs=0.2)


def _asked(batch):
    return {key: batch[key] for key in ("input_ids", "attention_mask", "labels_mask") if key in batch}


def test_beside_a_null_space_the_anchor_pulls_inside_it(anchored):
    *_, last, (hold, leak), _ = anchored
    assert leak < 1e-5
    gradients = {name: g for name, g in last.seen[3].items() if "lora_A" in name}
    for layer in hold.calibration.layer_names():
        (gradient,) = [g for name, g in gradients.items() if f".{layer.rpartition('.')[2]}." in name and layer in name]
        inside = apply(hold.calibration.basis_of(layer), gradient)
        assert torch.allclose(inside, gradient, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_limit_and_checkpointing(tiny_llama, tmp_path, checkpointing):
    """Fewer rows are fewer tokens, a lower limit takes fewer bytes, and recomputed activations change nothing."""
    settings = PolicySettings(
        path=str(tiny_llama), quantization="none", dtype="float32", gradient_checkpointing=checkpointing
    )
    found = {}
    for name, options in {"all": {}, "two": {"rows": 2}, "narrow": {"width_limit": 16}}.items():
        kept = Kept(CurvatureAnchor(coefficient=1.0, **options))
        pl.seed_everything(3)
        job = module(tiny_llama, policy=settings)
        sources = PromptSource(rows=harmful), PromptSource(rows=general)
        data = AlignmentDataModule(*sources, calibration_size=4, calibration_batch_size=1, batch_size=2)
        trainer(tmp_path, 1, callbacks=[kept.anchor, kept]).fit(job, data)
        ((_, curvature),) = kept.terms
        found[name] = curvature.tokens, kept.bytes
    assert found["two"][0] < found["all"][0]
    assert found["narrow"][1] < found["all"][1] == found["two"][1]


class Blind(pl.Callback):
    """Makes an anchor see next to nothing, before it looks what became of its text."""

    def __init__(self, anchor):
        self.anchor = anchor

    def on_train_end(self, trainer, pl_module):
        for _, curvature in self.anchor._terms:
            for of in curvature.layers:
                of.outputs.factor.mul_(1e-6)


@pytest.mark.parametrize("blind", [False, True])
def test_an_anchor_that_was_wrong_by_far_says_so(tiny_llama, tmp_path, blind, recwarn):
    anchor = CurvatureAnchor(coefficient=1e-6)
    fit(tiny_llama, tmp_path, [*([Blind(anchor)] if blind else []), anchor], 4)
    said = [str(w.message) for w in recwarn if "CurvatureAnchor foretold" in str(w.message)]
    assert len(said) == (1 if blind else 0)


def test_an_anchor_that_does_not_fit_is_refused_before_anything_is_measured(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("nspo_lightning.callbacks.curvature_anchor.free_memory", lambda: 1000)
    started = Started()
    with pytest.raises(MisconfigurationException, match="moments take .* GB, and .* are free.*`width_limit`"):
        trainer(tmp_path, 1, callbacks=[started, CurvatureAnchor()]).fit(module(tiny_llama), datamodule())
    assert not started.training


def test_a_text_without_a_scored_token_adds_nothing(tiny_llama):
    job = module(tiny_llama)
    job.load(torch.device("cpu"))
    batch = {"input_ids": torch.arange(12).reshape(1, 12), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    empty = {**batch, "labels_mask": torch.zeros(1, 12, dtype=torch.long)}
    parameters = [p for p in job.parameters() if p.requires_grad]
    for kind in ("kl", "nll", "drawn"):
        alone, both = (mean_gradients(job, texts, kind, parameters, job.device) for texts in ([batch], [batch, empty]))
        assert alone[1] == both[1]
        assert all(map(torch.equal, alone[0], both[0]))


def test_a_text_of_many_tokens_is_taken_in_parts(tiny_llama):
    """As the module bounds them for its own loss: the same gradient, in less memory."""
    found = {}
    for limit in (None, 24):
        pl.seed_everything(3)
        job = module(tiny_llama, tokens_per_microbatch=limit)
        job.load(torch.device("cpu"))
        batch = {"input_ids": torch.arange(48).reshape(4, 12), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
        sizes = Sizes(job.text_loss)
        job.text_loss = sizes
        parameters = [p for p in job.parameters() if p.requires_grad]
        found[limit] = (*mean_gradients(job, [batch], "nll", parameters, job.device), sizes.seen)
    whole, parts = found[None], found[24]
    one_name = {**batch, "domain": "a"}  # for all rows: nothing to be cut
    assert [part["domain"] for part in microbatches(one_name, 24)] == ["a", "a"]
    assert len(whole[2]) == 1
    assert len(parts[2]) > 1
    assert max(parts[2]) <= 24
    assert parts[1] == pytest.approx(whole[1], rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(whole[0], parts[0], strict=True))


@pytest.mark.parametrize("kind", [GeneralKL, CurvatureAnchor])
@pytest.mark.parametrize("starts", [0, 3])
def test_text_without_starts_is_refused_before_anything_is_measured(tiny_llama, tmp_path, starts, kind):
    size = 4 if starts == 0 else None  # None: all rows are calibrated on

    def data():
        sources = PromptSource(rows=harmful), PromptSource(rows=general)
        return AlignmentDataModule(*sources, calibration_size=size, calibration_starts=starts, batch_size=2)

    job, started = module(tiny_llama), Started()
    with pytest.raises(
        MisconfigurationException, match="has no starts of answers.*`data.calibration_size` that leaves"
    ):
        trainer(tmp_path, 1, callbacks=[started, kind(start_weight=0.5)]).fit(job, data())
    assert not started.training
    assert not job.base_answers.known


def test_text_of_ones_own_datamodule_without_starts_is_refused_too(tiny_llama, tmp_path):
    class Own(pl.LightningDataModule):
        def __init__(self):
            super().__init__()
            self.inner = with_starts()

        def setup(self, stage=None):
            self.inner.trainer = self.trainer
            self.inner.setup(stage)

        def train_dataloader(self):
            return self.inner.train_dataloader()

        def calibration_dataloader(self):
            return self.inner.calibration_dataloader()

    with pytest.raises(MisconfigurationException, match="has no starts of answers"):
        trainer(tmp_path, 1, callbacks=[GeneralKL(start_weight=0.5)]).fit(module(tiny_llama), Own())


@pytest.mark.parametrize("kind", [GeneralKL, CurvatureAnchor])
def test_a_weight_for_starts_is_a_share(kind):
    with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
        kind(start_weight=1.5)


def test_starts_are_split_from_text_row_by_row():
    ids = torch.arange(12).reshape(4, 3)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones(4, 3, dtype=torch.long),
        "answer_starts": torch.tensor([[0, 1, 1]] * 4).bool(),
        "domain": ["a", starts_of("a"), TO_LEARN, "b"],
    }
    text, starts = split_starts([batch])
    assert [part["input_ids"].tolist() for part in text] == [[[0, 1, 2], [9, 10, 11]]]
    assert text[0]["domain"] == ["a", "b"]
    assert [part["input_ids"].tolist() for part in starts] == [[3, 4, 5]]
    assert starts[0]["labels_mask"].tolist() == [0, 0, 1]  # what position 1 predicts; nothing stands behind the last
    plain = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    assert [part["input_ids"].tolist() for part in split_starts([plain])[0]] == [ids.tolist()]


def test_ogpsa_leaves_no_part_of_the_gradient_in_the_span_of_the_general_ones(tiny_llama, tmp_path):
    before, after, projection = Watched(), Watched(), OGPSA(rows=6, every_n_updates=2)
    _, policy = fit(tiny_llama, tmp_path, [before, projection, after], 3)
    named = [n for n, p in policy.named_parameters() if p.requires_grad]
    removed = 0.0
    for name, basis in zip(named, projection._bases, strict=True):  # those of update 2 served the last one
        flat, seen = basis.flatten(1), after.seen[2][name]
        assert torch.allclose(flat @ flat.mT, torch.eye(len(flat)), atol=1e-5)
        assert float((flat @ seen.flatten()).norm()) <= 1e-5 * float(before.seen[2][name].norm())
        removed += float((before.seen[2][name] - seen).norm())
    assert sum(map(len, projection._bases)) > 0
    assert removed > 0
    # While B is zero, general text says nothing of A: nothing can be removed there at the first update.
    for name in (n for n in named if "lora_A" in n):
        assert torch.equal(before.seen[0][name], after.seen[0][name])
    assert projection.held_bytes() == sum(4 * basis.numel() for basis in projection._bases)


def test_ogpsa_holds_a_fresh_adapters_a_from_its_second_update_on_also_where_a_run_goes_on_there(tiny_llama, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    before, after, projection = Watched(), Watched(), OGPSA(rows=6)
    parts = [before, projection, after, ExactResume()]
    _, policy = fit(tiny_llama, tmp_path, [*parts, keep], 3, enable_checkpointing=True)
    named = [n for n, p in policy.named_parameters() if p.requires_grad]
    bases = dict(zip(named, projection._bases, strict=True))
    for name in (n for n in named if "lora_A" in n):
        assert len(bases[name]) > 0
        for seen in after.seen[1:]:
            part = bases[name].flatten(1) @ seen[name].flatten()
            assert float(part.norm()) <= 1e-5 * float(before.seen[1][name].norm())
    resumed = OGPSA(rows=6)
    _, other = fit(tiny_llama, tmp_path, [resumed, ExactResume()], 3, checkpoint=str(tmp_path / "step=1.ckpt"))
    assert all(torch.equal(value, adapter(other)[name]) for name, value in adapter(policy).items())
    assert resumed._taken == projection._taken == 1, "once more, not before each update"


def test_directions_that_say_nothing_new_are_left_out():
    one, other = torch.randn(3, 4), torch.randn(3, 4)
    basis = orthonormal([torch.zeros(3, 4), one, other, 2 * one - other])
    assert basis.shape == (2, 3, 4)
    gradient = 3 * one - other + (rest := torch.randn(3, 4))
    remove_(rest, basis)
    remove_(gradient, basis)
    assert torch.allclose(gradient, rest, atol=1e-5)
    assert orthonormal([torch.zeros(2, 2)]).shape == (0, 2, 2)


def test_rows_are_sorted_by_skill():
    batch = {"input_ids": torch.arange(6).reshape(3, 2), "domain": ["b", "a", "b"]}
    texts = by_skill([batch, batch])
    assert list(texts) == ["a", "b"]
    assert [part["input_ids"].tolist() for part in texts["b"]] == [[[0, 1], [4, 5]]] * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: GeneralKL(coefficient=1.0, rows=2),
        lambda: GeneralKL(coefficient=1.0, rows=2, start_weight=0.5),
        lambda: CurvatureAnchor(coefficient=3.0),
        lambda: CurvatureAnchor(coefficient=3.0, start_weight=0.5, rows=2, width_limit=16),
        lambda: OGPSA(rows=4, every_n_updates=3),
    ],
)
def test_a_run_that_goes_on_has_the_weights_of_one_that_was_never_interrupted(make, tiny_llama, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    more = {"data": with_starts}
    _, whole = fit(tiny_llama, tmp_path, [make(), ExactResume(), keep], 4, enable_checkpointing=True, **more)
    last = str(tmp_path / "step=2.ckpt")
    _, resumed = fit(tiny_llama, tmp_path, [make(), ExactResume()], 4, checkpoint=last, **more)
    for name, value in adapter(whole).items():
        assert torch.equal(value, adapter(resumed)[name]), name


@pytest.mark.parametrize("kind", [GeneralKL, CurvatureAnchor])
@pytest.mark.parametrize("coefficient", [0.0, float("nan"), float("inf"), -1.0])
def test_a_penalty_that_is_none_is_refused(kind, coefficient):
    with pytest.raises(ValueError, match="leave the callback out"):
        kind(coefficient=coefficient)
    with pytest.raises(ValueError, match="at least 1"):
        kind(rows=0)
    with pytest.raises(ValueError, match="at least 1"):
        CurvatureAnchor(width_limit=0)
    with pytest.raises(ValueError, match="at least 1"):
        OGPSA(every_n_updates=0)


def test_a_module_that_knows_of_no_text_is_refused_before_training(tmp_path):
    for callback in (GeneralKL(), CurvatureAnchor(), OGPSA()):
        with pytest.raises(MisconfigurationException, match="has no `text_loss`"):
            trainer(tmp_path, 1, callbacks=[callback]).fit(Plain(), [torch.ones(2, 1)])


@pytest.mark.parametrize("kind", [GeneralKL, CurvatureAnchor])
def test_a_penalty_without_a_base_is_refused_before_anything_is_measured(tiny_llama, tmp_path, kind):
    settings = PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32", lora=None)
    job, started = module(tiny_llama, policy=settings), Started()
    with pytest.raises(MisconfigurationException, match="there is no adapter"):
        trainer(tmp_path, 1, callbacks=[started, kind()]).fit(job, datamodule())
    assert not started.training


class Started(pl.Callback):
    """Notes whether training began."""

    def __init__(self):
        self.training = False

    def on_train_start(self, trainer, pl_module):
        self.training = True


class Sizes:
    """Notes how many tokens each text has."""

    def __init__(self, text_loss):
        self.text_loss, self.seen = text_loss, []

    def __call__(self, batch, kind):
        self.seen.append(batch["input_ids"].numel())
        return self.text_loss(batch, kind)


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
