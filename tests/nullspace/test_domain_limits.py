"""Limits on single domains: what is promised there is what steps do, and no more than the limit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from embedded_linear import EmbeddedLinear

from nspo_lightning.nullspace import (
    TO_LEARN,
    BasisSettings,
    ForwardCall,
    NoNullDirections,
    calibrate_modules,
    certify,
    load_calibration,
    save_calibration,
)
from nspo_lightning.nullspace.contrast import candidates, choose_free, contrast_basis
from nspo_lightning.nullspace.domain_limits import promised, within_limits
from nspo_lightning.nullspace.domains import STARTS, starts_of

WIDTH = 16


def energies(**named):
    """Return a diagonal second moment with these energies, 1e-3 elsewhere; ``d3=1.0`` is the fourth channel."""
    values = torch.full((WIDTH,), 1e-3, dtype=torch.float64)
    for name, value in named.items():
        values[int(name[1:])] = value
    return torch.diag(values)


def turned(moment, seed):
    """Return the moment in another orthonormal basis, so that nothing depends on coordinates."""
    random = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = torch.linalg.qr(random).Q
    return q @ moment @ q.T


def inputs(seeds=(0, 1), limited=("look-alikes",)):
    """Two inputs in which safety needs four directions; look-alikes use two of them, code one of the others."""
    found = {}
    for seed in seeds:
        learnt = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        learnt[:4, :4] = torch.diag(torch.tensor([4.0, 3.0, 2.0, 2.0]).double())
        domains = {
            "facts": energies(d8=8.0, d9=4.0, d10=1.0),
            "code": energies(d2=2.0, d9=3.0, d11=1.0),
            "look-alikes": energies(d0=2.0, d1=1.0, d12=1.0),
        }
        # As two of many, code and look-alikes hardly weigh.
        general = 0.99 * domains["facts"] + 0.005 * domains["code"] + 0.005 * domains["look-alikes"]
        found[f"input {seed}"] = candidates(
            turned(general, seed),
            turned(learnt, seed),
            tokens=1,
            domains={name: turned(moment, seed) for name, moment in domains.items()},
            limited=limited,
        )
    return found


def test_a_domain_that_is_over_its_limit_holds_with_it():
    found = inputs()
    free = within_limits(found, {}, choose_free)
    assert free.promises["look-alikes"].harm > 0.2
    assert free.promises["look-alikes"].limit is None
    limits = {"look-alikes": 0.05}
    held = within_limits(found, limits, choose_free)
    assert held.promises["look-alikes"].harm <= 0.05
    assert 0 < held.promises["look-alikes"].weight < 1
    # Some of safety's energy is given up for it, and no more weight is given than it takes.
    gains = [
        sum(float(found.gain[WIDTH - of.choices[name].protected - 1]) for name, found in of.found.items())
        for of in (free, held)
    ]
    assert gains[1] < gains[0]
    weight = held.promises["look-alikes"].weight
    less = {name: of.reordered({"look-alikes": 0.8 * weight}) for name, of in found.items()}
    assert promised(less, choose_free(less))["look-alikes"] > 0.05


def conflicting():
    """An input in which look-alikes use the very directions that safety needs, as first layers do; and another one."""
    learnt = torch.diag(torch.tensor([2.0, 1.0] + [0.0] * (WIDTH - 2)).double())
    found = {}
    for name, looks in (("first", 3 * learnt + energies()), ("second", energies(d9=2.0))):
        general = 0.95 * energies(d8=3.0) + 0.05 * looks
        found[name] = candidates(general, learnt, tokens=99, domains={"looks": looks}, limited=["looks"])
    return found


def test_an_input_in_which_a_limited_domain_needs_the_same_is_left_alone():
    """No weight makes its directions harmless; a direction that nobody uses is free, and nothing is learnt there."""
    held = within_limits(conflicting(), {"looks": 0.05}, choose_free)
    assert held.choices["first"].spare
    assert not held.choices["second"].spare
    assert held.promises["looks"].harm <= 0.05
    basis = contrast_basis(held.found["first"], held.choices["first"])
    assert basis.null_dims == 1
    assert float(basis.vectors[:2].abs().max()) < 1e-5
    learnt = torch.diag(torch.tensor([2.0, 1.0] + [0.0] * (WIDTH - 2)).double())
    c = 0.95 * energies(d8=3.0) + 0.05 * (3 * learnt + energies())
    update = (torch.randn(3, 1, generator=torch.Generator().manual_seed(0)) @ basis.vectors.T).double()
    change = float(((update @ c) * update).sum() / c.trace()) ** 0.5
    assert 0 < change <= certify("first", basis, update).output_change * (1 + 1e-5)


def test_what_is_promised_is_what_steps_do():
    """Against sums over steps b x' along what is learnt from, confined to the free space, input by input."""
    found = inputs()
    held = within_limits(found, {"look-alikes": 0.1}, choose_free)
    costs, plain, gains = [], [], []
    for seed, (name, of) in enumerate(held.found.items()):
        space = of.directions[:, : WIDTH - held.choices[name].protected].double()
        torch.testing.assert_close(space.T @ space, torch.eye(space.shape[1]).double(), atol=1e-6, rtol=0)
        learnt = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        learnt[:4, :4] = torch.diag(torch.tensor([4.0, 3.0, 2.0, 2.0]).double().sqrt())
        rows = turned(learnt, seed)  # sum of x x' is S
        c = turned(energies(d0=2.0, d1=1.0, d12=1.0), seed)
        steps = rows @ space @ space.T
        gains.append(float((steps * rows).sum() / (rows**2).sum()))
        costs.append(float(((steps @ c) * steps).sum() / (rows**2).sum() / c.trace()))
        plain.append(float(((rows @ c) * rows).sum() / (rows**2).sum() / c.trace()))
    harm = sum(costs) / 2 / (sum(gains) / 2) ** 2 / (sum(plain) / 2)
    assert held.promises["look-alikes"].harm == pytest.approx(harm, rel=1e-4)


def test_several_limits_hold_together():
    found = inputs(limited=("look-alikes", "code"))
    free = within_limits(found, {}, choose_free)
    limits = {domain: free.promises[domain].harm / 2 for domain in ("look-alikes", "code")}
    alone = within_limits(found, {"code": limits["code"]}, choose_free)
    assert alone.promises["look-alikes"].harm > limits["look-alikes"]
    held = within_limits(found, limits, choose_free)
    assert all(held.promises[domain].harm <= limit for domain, limit in limits.items())


def test_a_limit_that_holds_anyhow_changes_nothing():
    found = inputs()
    free, held = within_limits(found, {}, choose_free), within_limits(found, {"look-alikes": 5.0}, choose_free)
    assert held.promises["look-alikes"].weight == 0
    for name in found:
        assert held.choices[name] == free.choices[name]
        torch.testing.assert_close(held.found[name].directions, free.found[name].directions)


def test_a_limit_that_cannot_be_held_says_which_could_and_that_holds():
    found = inputs()
    with pytest.raises(NoNullDirections) as caught:
        within_limits(found, {"look-alikes": 1e-6, "code": 99.0}, choose_free)
    said = str(caught.value)
    assert len(said.splitlines()) <= 4
    assert max(map(len, said.splitlines())) < 150
    assert "beside those on code" in said
    advised = float(said.split("a limit of ")[1].split()[0])
    assert 1e-6 < advised < 0.05
    assert within_limits(found, {"look-alikes": advised, "code": 99.0}, choose_free).promises["look-alikes"].weight > 0


def test_a_dead_channel_stays_no_freedom_under_a_limit():
    def without(moment):
        moment = moment.clone()
        moment[:, 15] = moment[15] = 0
        return moment

    facts, looks = energies(d8=8.0), energies(d0=2.0, d1=2.0)
    learnt = torch.diag(torch.tensor([4.0, 3.0, 0.5] + [0.0] * (WIDTH - 3)).double())
    of = candidates(
        without(facts + 0.002 * looks),
        without(learnt),
        tokens=1,
        domains={"looks": without(looks)},
        limited=["looks"],
    )
    held = within_limits({"x": of}, {"looks": 0.1}, choose_free)
    assert held.promises["looks"].weight > 0
    assert float(held.found["x"].directions[15, : held.found["x"].most].abs().max()) < 1e-6


def calls():
    """General text, look-alikes, further look-alikes of which the start alone counts, and what is to be learnt."""
    generator = torch.Generator().manual_seed(0)
    domains = ["facts", "look-alikes", starts_of("look-alikes"), TO_LEARN] * 2
    for rows in (domains, domains[::-1], ["facts"] * 3):
        ids = torch.randint(0, 12, (len(rows), 6), generator=generator)
        ids[[i for i, name in enumerate(rows) if "look-alikes" in name]] //= 3
        starts = torch.zeros_like(ids, dtype=torch.bool)
        starts[:, 3:] = True
        yield ForwardCall(kwargs={"input_ids": ids}, mask=torch.ones_like(ids), domains=rows, starts=starts)


def calibrated(settings, **options):
    torch.manual_seed(0)
    model = EmbeddedLinear(12, 8)
    return model, calibrate_modules({"linear": model.linear}, model, lambda: list(calls()), settings, **options)


def test_a_limited_domain_counts_with_the_starts_of_its_own_answers(tmp_path):
    settings = BasisSettings(criterion="contrast", domain_limits={"look-alikes": 1e3})
    model, found = calibrated(settings, keep_moments=True)

    def hand(wanted, starts):
        rows = [
            model.embed(call.kwargs["input_ids"][i])[call.starts[i] if starts else slice(None)]
            for call in calls()
            for i, name in enumerate(call.domains)
            if name in wanted
        ]
        x = torch.cat(rows).detach().double()
        return x.T @ x / len(x)

    names = ("look-alikes", starts_of("look-alikes"))
    wanted = {
        "look-alikes": hand(names[:1], False),
        starts_of("look-alikes"): hand(names, True),
        STARTS: hand(("facts", *names), True),
    }
    for name, moment in wanted.items():
        torch.testing.assert_close(found.moments["linear"][name].double(), moment, atol=1e-6, rtol=1e-6)
    assert set(found.domain_tokens) == {"facts", "look-alikes", TO_LEARN} - {TO_LEARN}
    # What is promised of it is over both.
    kept = {name: moment.double() for name, moment in found.moments["linear"].items()}
    c = settings.shares(kept)
    mixed = sum(share * kept[name] for name, share in c.items())
    of = candidates(
        mixed,
        kept["answer starts, to learn"],
        tokens=1,
        domains={"look-alikes": 0.1 * wanted["look-alikes"] + 0.9 * wanted[starts_of("look-alikes")]},
    )
    assert found.promises["look-alikes"].harm == pytest.approx(
        promised({"linear": of}, choose_free({"linear": of}))["look-alikes"], rel=1e-4
    )
    assert set(found.promises) == {"facts", "look-alikes", STARTS}
    loaded = load_calibration(save_calibration(found, tmp_path / "basis.safetensors"))
    assert loaded.promises == found.promises
    assert loaded.settings.as_dict() == settings.as_dict()
    # Without a limit the same text gives the same bases as before there were any, and promises all the same.
    _, free = calibrated(BasisSettings(criterion="contrast"))
    assert free.bases["linear"].choice.protected == found.bases["linear"].choice.protected
    assert free.bases["linear"].choice.gain == pytest.approx(found.bases["linear"].choice.gain, rel=1e-9)
    assert free.promises["facts"].harm == pytest.approx(found.promises["facts"].harm, rel=1e-6)


def test_kept_moments_give_limits_anew_where_starts_were_kept_apart():
    loose = BasisSettings(criterion="contrast", domain_limits={"look-alikes": 1e3})
    _, found = calibrated(loose, keep_moments=True)
    limit = 0.7 * found.promises["look-alikes"].harm
    held = replace(loose, domain_limits={"look-alikes": limit})
    assert found.recombined(held).promises["look-alikes"].harm <= limit
    _, unlimited = calibrated(BasisSettings(criterion="contrast"), keep_moments=True)
    with pytest.raises(ValueError, match="calibrate with this limit"):
        unlimited.recombined(held)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"criterion": "auto"}, "kept by criterion='contrast'"),
        ({"domain_limits": {"look-alikes": 0.0}}, "must be positive"),
        ({"without_domains": ("look-alikes",)}, "Name it in one of them"),
    ],
)
def test_settings_that_contradict_limits_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        BasisSettings(**{"criterion": "contrast", "domain_limits": {"look-alikes": 0.1}, **options})


def test_an_unknown_domain_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"names \['benign'\]; calibration saw \['facts', 'look-alikes'\]"):
        calibrated(BasisSettings(criterion="contrast", domain_limits={"benign": 0.1}))
