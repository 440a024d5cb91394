"""The criterion that knows what safety needs: which directions become free, how many, and what the basis promises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from embedded_linear import EmbeddedLinear
from torch import nn

from nspo_lightning.callbacks.null_space.text_sample import TextSample
from nspo_lightning.nullspace import (
    TO_LEARN,
    BasisSettings,
    ForwardCall,
    NoNullDirections,
    calibrate_modules,
    certify,
    choose_rank,
    load_calibration,
    save_calibration,
)
from nspo_lightning.nullspace.contrast import NEGLIGIBLE_SHARE, candidates, choose_free, contrast_basis
from nspo_lightning.nullspace.domains import APART, STARTS, STARTS_TO_LEARN, starts_of
from nspo_lightning.nullspace.projection import apply, protected_component


def moment(rows):
    return rows.T.double() @ rows.double() / len(rows)


def random_rows(number, width, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(number, rank or width, generator=generator, dtype=torch.float64)
    return rows if rank is None else rows @ torch.randn(rank, width, generator=generator, dtype=torch.float64)


def spectra():
    """Yield (name, C, S) of inputs as they are found, and as they should not be."""
    width = 24
    flat = torch.eye(width, dtype=torch.float64)
    dead = moment(random_rows(400, width, 0))
    dead[3], dead[:, 3] = 0, 0
    dead_learnt = moment(random_rows(400, width, 1))
    dead_learnt[3], dead_learnt[:, 3] = 0, 0
    massive = moment(random_rows(400, width, 2))
    massive[0, 0] = 1e8
    yield "ordinary", moment(random_rows(400, width, 3)), moment(random_rows(400, width, 4))
    yield "dead channel", dead, dead_learnt
    yield "ties", flat, flat
    yield "flat, something to learn", flat, moment(random_rows(400, width, 5, rank=2))
    yield "too few rows", moment(random_rows(5, width, 6)), moment(random_rows(3, width, 7))
    yield "a massive leader", massive, moment(random_rows(400, width, 8))


@pytest.mark.parametrize(("c", "s"), [pytest.param(c, s, id=name) for name, c, s in spectra()])
def test_gain_and_cost_are_those_of_steps_along_what_is_learnt_from(c, s):
    """Against sums over steps b x', confined to the free space: what they move of x itself, and of general text."""
    found = candidates(c, s, tokens=1, most_free=1.0)
    kept = found.directions.double()
    torch.testing.assert_close(kept.T @ kept, torch.eye(kept.shape[1], dtype=torch.float64), atol=1e-5, rtol=0)
    values, vectors = torch.linalg.eigh(s)
    learnt = (vectors * values.clamp_min(0).sqrt()).T  # rows x with sum x x' = S

    def measured(space):
        steps = learnt @ space @ space.T
        gain = float((steps * learnt).sum() / s.trace())
        return gain, float(((steps @ c) * steps).sum() / (s.trace() * c.trace()))

    for m in (1, 2, kept.shape[1]):
        part = kept[:, :m]
        gain, cost = measured(part)
        assert float(found.gain[m - 1]) == pytest.approx(gain, abs=1e-5)
        assert float(found.cost[m - 1]) == pytest.approx(cost, abs=1e-5)
        assert float(found.energy[m - 1]) == pytest.approx(float((part.T @ c @ part).trace() / c.trace()), abs=1e-5)
    _, everywhere = measured(torch.eye(24, dtype=torch.float64))
    assert found.unprojected == pytest.approx(everywhere, rel=1e-6)
    choice = choose_free({"x": found})["x"]
    free = 24 - choice.protected
    assert 1 <= free < 24
    assert float(found.gain[free - 1]) > 1e-3  # something can be learnt there
    gain, cost = measured(kept[:, :free])
    assert choice.gain == pytest.approx((cost + NEGLIGIBLE_SHARE * gain) / gain**2 / everywhere, rel=1e-3)


def test_no_more_is_free_than_there_is_to_learn():
    """The means of a few positions span few directions; the rest of the width would be freedom for nothing."""
    c, s = moment(random_rows(400, 24, 0)), moment(random_rows(400, 24, 5, rank=2))
    assert len(candidates(c, s, tokens=1).energy) == 2
    found = {"x": candidates(c, s, tokens=1, least_free=0.25)}
    assert 24 - choose_free(found, min_null_share=0.25)["x"].protected == 6  # unless it is asked for


@pytest.mark.parametrize("rows", [48, 480])
def test_what_it_promises_is_kept_on_text_that_it_did_not_see(rows):
    """Few rows leave directions unused by chance: with a small r they would be taken for free ones."""
    width = 96
    scale = torch.linspace(0, -4, width, dtype=torch.float64).exp()
    general, unseen = (random_rows(n, width, seed) * scale for n, seed in ((rows, 0), (4000, 1)))
    safety = (random_rows(4, width, 2)) * scale.flip(0)
    found = candidates(moment(general), moment(safety), tokens=rows)
    free = width - choose_free({"x": found})["x"].protected
    part = found.directions[:, :free].double()
    c, s = moment(unseen), moment(safety)
    steps = safety @ part @ part.T
    gain = float((steps * safety).sum() / (safety**2).sum())
    cost = float(((steps @ c) * steps).sum() / (safety**2).sum() / c.trace())
    plain = float(((safety @ c) * safety).sum() / (safety**2).sum() / c.trace())
    assert cost / gain**2 < 3 * found.harm(free) * plain
    assert s.trace() > 0


def test_a_dead_channel_is_no_freedom():
    c, s = next((c, s) for name, c, s in spectra() if name == "dead channel")
    found = candidates(c, s, tokens=1, most_free=0.5)
    assert float(found.directions[3].abs().max()) < 1e-6


def test_the_first_direction_is_the_one_that_safety_uses_and_general_text_does_not():
    c = torch.diag(torch.tensor([8.0, 4.0, 1e-3, 1e-3, 1e-3])).double()
    s = torch.diag(torch.tensor([8.0, 4.0, 0.0, 2.0, 0.0])).double()
    found = candidates(c, s, tokens=1, most_free=1.0)
    assert abs(float(found.directions[3, 0])) == pytest.approx(1.0, abs=1e-6)
    choice = choose_free({"x": found})["x"]
    assert choice.protected == 4
    assert choice.energy_left == pytest.approx(1e-3 / 12.003, rel=1e-3)


def test_one_multiplier_serves_all_inputs():
    """No other multiplier predicts less harm; an input in conflict gets less than one without."""
    free = candidates(
        torch.diag(torch.tensor([1.0] * 6 + [1e-4] * 6)), torch.diag(torch.tensor([1e-4] * 6 + [1.0] * 6)), tokens=1
    )
    conflict = candidates(torch.eye(12), torch.eye(12), tokens=1)
    found = {"free": free, "conflict": conflict}
    choices = choose_free(found)

    def harm(counts):
        cost = sum(float(found[n].cost[m - 1]) for n, m in counts.items()) / 2
        gain = sum(float(found[n].gain[m - 1]) for n, m in counts.items()) / 2
        return (cost + NEGLIGIBLE_SHARE * gain) / gain**2

    chosen = harm({name: 12 - choice.protected for name, choice in choices.items()})
    for t in torch.logspace(-2, 6, 41).tolist():
        counts = {n: 1 + int((of.gain - t * of.cost).argmax()) for n, of in found.items()}
        assert chosen <= harm(counts) * (1 + 1e-9)
    assert choices["conflict"].protected > choices["free"].protected


def test_limits_are_kept_and_contradictions_refused():
    found = {"x": candidates(moment(random_rows(99, 16, 0)), moment(random_rows(99, 16, 1)), tokens=1, most_free=0.75)}
    assert 16 - choose_free(found, min_null_share=0.5)["x"].protected >= 8
    change = math.sqrt(float(found["x"].energy[1]))
    assert choose_free(found, max_output_change=change)["x"].energy_left <= change**2 * (1 + 1e-12)
    with pytest.raises(NoNullDirections, match="Relax"):
        choose_free(found, min_null_share=0.5, max_output_change=change)


@pytest.mark.parametrize("subspace", ["null", "random", "protected"])
def test_what_the_certificate_bounds_is_never_exceeded(subspace):
    x = random_rows(300, 20, 2)
    c = moment(x)
    of = candidates(c, moment(random_rows(300, 20, 3)), tokens=300)
    basis = contrast_basis(of, choose_free({"x": of})["x"], subspace=subspace)
    for seed in range(5):
        inside = apply(basis, torch.randn(6, 20, generator=torch.Generator().manual_seed(seed)))
        outside = inside + 1e-2 * torch.randn(6, 20, generator=torch.Generator().manual_seed(seed + 99))
        for update in (inside, outside):
            said = certify("x", basis, update)
            true = float(((update.double() @ x.T) ** 2).sum() / ((x**2).sum() / 300) / 300) ** 0.5
            assert true <= said.output_change * (1 + 1e-5)
        assert float(protected_component(basis, inside.double()).norm()) < 1e-5 * float(inside.norm())


def calls(side="right"):
    """Two general texts and two to learn from in one batch, padded, and a batch of each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 11, (4, 7), generator=generator)
    mask = torch.ones(4, 7, dtype=torch.long)
    starts = torch.zeros(4, 7, dtype=torch.bool)
    mask[1, :2] = mask[2, :3] = 0
    starts[:, 4:6] = True
    if side == "right":
        ids, mask, starts = (tensor.flip(1) for tensor in (ids, mask, starts))
    domains = ["maths", "code", TO_LEARN, TO_LEARN]
    for rows in (slice(0, 4), slice(0, 2), slice(2, 4), slice(1, 3)):
        kwargs = {"input_ids": ids[rows], "attention_mask": mask[rows]}
        yield ForwardCall(kwargs=kwargs, mask=mask[rows], domains=domains[rows], starts=starts[rows])


def calibrated(settings, side="right", **options):
    torch.manual_seed(0)
    model = EmbeddedLinear(11, 6)
    found = calibrate_modules({"linear": model.linear}, model, lambda: calls(side), settings, **options)
    return model, found


def by_hand(model, side, domain, starts=False):
    rows = [
        model.embed(call.kwargs["input_ids"][i])[
            (call.mask[i] != 0) & (call.starts[i] if starts else torch.ones_like(call.starts[i]))
        ]
        for call in calls(side)
        for i, name in enumerate(call.domains)
        if name in domain
    ]
    return moment(torch.cat(rows).detach())


def means_by_hand(model, side):
    """Return the second moment of the means, over the texts to learn from, at each position of an answer's start."""
    rows = [
        model.embed(call.kwargs["input_ids"][i])[call.starts[i]]
        for call in calls(side)
        for i, name in enumerate(call.domains)
        if name == TO_LEARN
    ]
    return moment(torch.stack(rows).mean(0).detach())


@pytest.mark.parametrize("side", ["left", "right"])
def test_moments_are_those_of_each_text_and_of_its_answers_starts(side):
    settings = BasisSettings(criterion="contrast", start_weight=0.75)
    model, found = calibrated(settings, side, keep_moments=True)
    kept = {name: m.double() for name, m in found.moments["linear"].items()}
    assert set(kept) == {"maths", "code", *APART} - {TO_LEARN}  # whose starts are known
    for name, hand in {
        "maths": by_hand(model, side, {"maths"}),
        "code": by_hand(model, side, {"code"}),
        STARTS: by_hand(model, side, {"maths", "code"}, starts=True),
        STARTS_TO_LEARN: means_by_hand(model, side),
    }.items():
        torch.testing.assert_close(kept[name], hand, atol=1e-6, rtol=1e-6)
    c = 0.125 * kept["maths"] + 0.125 * kept["code"] + 0.75 * kept[STARTS]
    of = candidates(c, kept[STARTS_TO_LEARN], tokens=1)
    wanted = contrast_basis(of, choose_free({"linear": of})["linear"])
    probe = torch.randn(3, 6)
    torch.testing.assert_close(apply(found.bases["linear"], probe), apply(wanted, probe), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("out", [{"without_domains": ("code",)}, {"domain_weights": {"maths": 2.0}}])
def test_a_domain_that_is_left_out_has_no_answers_starts_in_what_is_protected_either(out):
    settings = BasisSettings(criterion="contrast", start_weight=0.75, **out)
    alone = replace(next(calls()), domains=[starts_of("code")] * 2 + [TO_LEARN] * 2)
    torch.manual_seed(0)
    model = EmbeddedLinear(11, 6)
    batches = [*calls(), alone]  # the last has starts alone, of the domain that is left out too
    found = calibrate_modules({"linear": model.linear}, model, lambda: batches, settings, keep_moments=True)
    kept = {name: m.double() for name, m in found.moments["linear"].items()}
    torch.testing.assert_close(kept[STARTS], by_hand(model, "right", {"maths"}, starts=True), atol=1e-6, rtol=1e-6)
    everything = BasisSettings(criterion="contrast", start_weight=0.75)
    with pytest.raises(ValueError, match=r"starts of answers were summed .* \(code differ\)"):
        found.recombined(everything)
    assert found.recombined(replace(everything, start_weight=0.0)).bases


def test_where_no_starts_are_known_all_of_the_text_is_learnt_from():
    settings = BasisSettings(criterion="contrast", start_weight=0.0)
    unmarked = [replace(call, starts=None) for call in calls()]
    for batches in (unmarked, list(calls())):
        torch.manual_seed(0)
        model = EmbeddedLinear(11, 6)
        found = calibrate_modules({"linear": model.linear}, model, lambda: batches, settings, keep_moments=True)  # noqa: B023
        if batches is unmarked:
            torch.testing.assert_close(
                found.moments["linear"][TO_LEARN].double(), by_hand(model, "right", {TO_LEARN}), atol=1e-6, rtol=1e-6
            )


def test_of_rows_of_answer_starts_nothing_else_counts():
    """Further rows are there for their starts alone; the rest of such a text must not weigh in any domain."""
    settings = BasisSettings(criterion="contrast")
    _, found = calibrated(settings, keep_moments=True)
    torch.manual_seed(0)
    model = EmbeddedLinear(11, 6)
    further = [replace(call, domains=[STARTS if d == "code" else d for d in call.domains]) for call in calls()]
    other = calibrate_modules({"linear": model.linear}, model, lambda: further, settings, keep_moments=True)
    assert "code" not in other.moments["linear"]
    for domain in (STARTS, STARTS_TO_LEARN, "maths"):
        torch.testing.assert_close(other.moments["linear"][domain], found.moments["linear"][domain])


def test_other_criteria_do_not_see_the_prompts_that_are_trained_on():
    model, found = calibrated(BasisSettings(criterion="energy", threshold=0.05))
    alone = [call for call in calls() if TO_LEARN not in call.domains]
    alone = [*alone, *_without_learning(calls())]
    plain = calibrate_modules(
        {"linear": model.linear}, model, lambda: alone, BasisSettings(criterion="energy", threshold=0.05)
    )
    probe = torch.randn(3, 6)
    torch.testing.assert_close(apply(found.bases["linear"], probe), apply(plain.bases["linear"], probe))


def _without_learning(batches):
    for call in batches:
        rows = [i for i, name in enumerate(call.domains) if name != TO_LEARN]
        if rows and len(rows) < len(call.domains):
            kwargs = {name: value[rows] for name, value in call.kwargs.items()}
            yield ForwardCall(kwargs=kwargs, mask=call.mask[rows], domains=[call.domains[i] for i in rows])


def test_neither_a_spectrum_nor_a_sketch_is_taken_for_it():
    with pytest.raises(ValueError, match="second moments, not their spectra"):
        choose_rank(torch.ones(4), "contrast")
    wide = nn.Linear(512, 4)
    batches = [ForwardCall(args=(torch.randn(8, 512),), domains=[domain] * 8) for domain in ("general", TO_LEARN)]
    with pytest.raises(ValueError, match="do not fit into `memory_budget_gb`"):
        calibrate_modules(
            {"w": wide}, wide, lambda: batches, BasisSettings(criterion="contrast"), memory_budget_gb=1e-3
        )


def test_without_prompts_to_learn_from_it_says_what_to_give():
    torch.manual_seed(0)
    model = EmbeddedLinear(11, 6)
    general = list(_without_learning(calls()))
    with pytest.raises(ValueError, match="prompts that are trained on.*to learn"):
        calibrate_modules({"linear": model.linear}, model, lambda: general, BasisSettings(criterion="contrast"))


def test_a_basis_survives_its_file_and_the_moments_give_it_again(tmp_path):
    settings = BasisSettings(criterion="contrast")
    _, found = calibrated(settings, keep_moments=True)
    loaded = load_calibration(save_calibration(found, tmp_path / "basis.safetensors"))
    probe = torch.randn(3, 6)
    for other in (loaded, found.recombined(settings)):
        assert other.bases["linear"].choice.protected == found.bases["linear"].choice.protected
        assert other.bases["linear"].oblique
        torch.testing.assert_close(
            apply(other.bases["linear"], probe), apply(found.bases["linear"], probe), atol=1e-4, rtol=1e-4
        )
        assert other.output_energy == pytest.approx(found.output_energy)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"threshold": 0.1}, "takes no"), ({"form": "soft"}, "no cut"), ({"start_weight": 2.0}, "share in")],
)
def test_settings_that_contradict_it_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        BasisSettings(criterion="contrast", **options)


def test_outputs_are_looked_at_on_text_to_protect_alone():
    """Of further rows only the start is in K, and what is to be learnt must move."""
    of = TextSample.of([*calls(), *_without_learning(calls())])
    assert of.rows
    assert {name for call in of.rows for name in call.domains or ()} == {"maths", "code"}
    starts_alone = [replace(call, domains=[STARTS] * len(call.domains or ())) for call in calls()]
    assert not TextSample.of(starts_alone).rows
