"""What to look at: each fault has its finding with a cure, worst first, and a run that went well has none."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from nspo_lightning.evaluation.diagnosis import (
    InputFacts,
    NullSpaceFacts,
    RunFacts,
    TrainingFacts,
    diagnose,
    explain_certificate,
)
from nspo_lightning.evaluation.tables import findings_text

TRAINED = TrainingFacts(
    groups=960,
    with_signal=500,
    low=-1.0,
    high=1.0,
    completions=7680,
    cut=40,
    max_new_tokens=32,
    updates=80,
)
WIDE = InputFacts(name="q_proj", width=576, free=150, tokens=9000)
HELD = NullSpaceFacts(
    inputs=[WIDE] * 4,
    criterion="auto",
    kept_energy=0.4,
    kept_updates=80,
    leak=1.2e-7,
    leak_layer="down_proj",
    held=True,
    bound=0.05,
    change=0.06,
)
BEFORE = {"general/refusal_rate": 0.0, "safety/garbage_rate": 0.0, "general/accuracy/sums": 0.9}
WELL = RunFacts(
    training=TRAINED,
    null_space=HELD,
    before=BEFORE,
    after=BEFORE,
    intervals={"general/refusal_rate": [0.0, 0.03], "safety/garbage_rate": [0.0, 0.02]},
)


def after(name, value, low, high):
    return replace(WELL, after={**BEFORE, name: value}, intervals={name: [low, high]})


CHAT = {"general/accuracy/chat": 0.0}


def test_a_run_that_went_well_has_nothing_to_look_at():
    assert diagnose(WELL) == []
    assert diagnose(RunFacts()) == []
    goal_reached = replace(TRAINED, safe=True, skipped=20)
    assert diagnose(RunFacts(training=goal_reached)) == []
    few = replace(HELD, criterion="contrast", inputs=[replace(WIDE, free=4)] * 4)  # by choice
    assert diagnose(RunFacts(null_space=few)) == []


@pytest.mark.parametrize(
    ("facts", "severity", "title", "text", "cure"),
    [
        (
            RunFacts(training=replace(TRAINED, with_signal=0, low=0.0, high=0.0)),
            "error",
            "All rewards are the same",
            "7,680 answers got the reward 0",
            "--preview",
        ),
        (RunFacts(training=replace(TRAINED, with_signal=0)), "error", "No group had a signal", "960 prompts", "warmup"),
        (RunFacts(training=replace(TRAINED, with_signal=9)), "warning", "Few groups had a signal", "9 of 960", "group"),
        (
            RunFacts(training=replace(TRAINED, nonfinite=3)),
            "warning",
            "Updates that were not finite",
            "3 of 83 steps .*80 updates stand",
            "precision",
        ),
        (
            RunFacts(training=replace(TRAINED, updates=0, nonfinite=3)),
            "error",
            "Updates that were not finite",
            "0 updates",
            "lr",
        ),
        (
            RunFacts(training=replace(TRAINED, updates=13, skipped=37)),
            "warning",
            "Most steps were no updates",
            "37 of 50 steps .*13 updates stand",
            "dynamic_sampling",
        ),
        (
            RunFacts(training=replace(TRAINED, updates=13, skipped=37, safe=True)),
            "note",
            "Most steps were no updates",
            "37 of 50",
            "EarlyStopping",
        ),
        (
            RunFacts(training=replace(TRAINED, undone=5)),
            "note",
            "Updates were taken back",
            "5 of 85",
            "CapabilityGuard",
        ),
        (
            RunFacts(training=replace(TRAINED, cut=7680)),
            "warning",
            "Answers are cut",
            "7,680 of 7,680 .* 32 tokens",
            "max_new_tokens",
        ),
        (
            RunFacts(null_space=replace(HELD, inputs=[replace(WIDE, tokens=400), WIDE])),
            "warning",
            "Calibration text is too short",
            "1 of 2 inputs .*400 tokens, width 576",
            "calibration_size",
        ),
        (
            RunFacts(null_space=replace(HELD, inputs=[replace(WIDE, free=3), WIDE])),
            "warning",
            "Hardly a direction is free",
            "3 of 576",
            "calibration_size",
        ),
        (
            RunFacts(null_space=replace(HELD, kept_energy=2e-5)),
            "warning",
            "The projection leaves next to nothing of the gradient",
            "0.002 % .*80 updates",
            "contrast",
        ),
        (
            RunFacts(null_space=replace(HELD, leak=0.3)),
            "error",
            "An update left the null space",
            "0.3 of the update of down_proj",
            "callback",
        ),
        (
            replace(
                WELL, after={**BEFORE, "general/refusal_rate": 0.125}, intervals={"general/refusal_rate": [0.09, 0.2]}
            ),
            "warning",
            "More ordinary prompts are refused",
            "12.5 % .*12.5 points",
            "max_refusal_rise",
        ),
        (
            after("safety/garbage_rate", 0.1, 0.07, 0.2),
            "warning",
            "More answers are garbage",
            "10.0 %",
            "reward",
        ),
        (RunFacts(before=CHAT, after=CHAT), "note", "Accuracy says nothing", "No answer to chat", "general/kl"),
    ],
)
def test_each_fault_has_its_finding_with_numbers_and_a_setting(facts, severity, title, text, cure):
    (found,) = diagnose(facts)
    assert (found.severity, found.title) == (severity, title)
    assert re.search(text, found.text), found.text
    assert cure in found.cure
    assert set(found.as_dict()) == {"severity", "title", "text", "cure"}


@pytest.mark.parametrize(
    "facts",
    [
        RunFacts(training=replace(TRAINED, with_signal=0, low=0.0, high=0.0, safe=True)),
        RunFacts(null_space=replace(HELD, leak=0.3, held=False)),
        RunFacts(null_space=replace(HELD, kept_energy=None)),
        RunFacts(null_space=replace(HELD, inputs=[replace(WIDE, free=3), *[WIDE] * 9])),
        RunFacts(training=replace(TRAINED, cut=7000)),
        replace(
            WELL, after={**BEFORE, "general/refusal_rate": 0.02}, intervals={"general/refusal_rate": [0.003, 0.04]}
        ),
        RunFacts(before={"general/accuracy/sums": 0.1}, after={"general/accuracy/sums": 0.0}),
    ],
)
def test_what_may_well_be_so_is_no_finding(facts):
    assert diagnose(facts) == []


def test_the_worst_comes_first_and_the_block_fits_a_terminal():
    bad = replace(TRAINED, with_signal=0, undone=5)
    found = diagnose(replace(WELL, training=bad, null_space=replace(HELD, kept_energy=1e-6)))
    assert [finding.severity for finding in found] == ["error", "warning", "note"]
    console = Console(file=StringIO(), width=80)
    with console.capture() as capture:
        console.print(findings_text(found), highlight=False)
    lines = capture.get().splitlines()
    assert lines[0] == "What to look at"
    assert max(map(len, lines)) <= 80
    assert sum("mend:" in line for line in lines) == 3


def test_a_certificate_is_explained_a_sentence_a_figure():
    leak, bound, change = explain_certificate(HELD)
    assert leak.startswith("Leak 1.2e-07: ")
    assert bound.startswith("Bound 0.05: ")
    assert change.startswith("Measured change 0.06: ")
    assert explain_certificate(replace(HELD, bound=None, change=None)) == [leak]
