"""A run in a terminal of 80 columns, as pyte draws it: one bar, every line stays, the last ones say how it ended."""

from __future__ import annotations

import os
import random
import re
import signal
from pathlib import Path

import pytest
import yaml
from pseudo_terminal import Terminal, in_terminal
from workspace import build

from nspo_lightning.cli.app import main
from nspo_lightning.terminal import rows_progress

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")


def noisy(prompts, completions, **_):
    """A reward that has a signal on any policy."""
    return [random.random() for _ in completions]


@pytest.fixture(scope="module")
def job(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    build(folder, tiny_llama)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    path = {"path": "test_real_terminal.noisy"}
    config["model"]["reward"] = {"class_path": "nspo_lightning.rewards.FunctionReward", "init_args": path}
    config["trainer"] |= {"enable_progress_bar": True, "limit_train_batches": 8, "val_check_interval": 2}
    early = {"monitor": "general/accuracy", "patience": 2, "mode": "max"}
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": early}
    config["trainer"]["callbacks"] = [stopping]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def whole(job: Path) -> Terminal:
    """A run that stops early."""
    return in_terminal(job, lambda: main(["fit", "-c", "config.yaml"]))


def bars(screen: list[str], label: str) -> int:
    return sum(line.startswith(f"{label} ") and " of " in line for line in screen)


def test_the_closing_lines_stand_and_say_why_it_stopped(whole: Terminal) -> None:
    assert whole.code == 0, whole.text
    for said in (
        r"Null space checked: outputs on \d+ calibration text",
        r"Stopped early at step 6: Monitored metric\s+general/accuracy\s+did\s+not\s+improve",
        r"Held-out prompts, before and after",
        r"largest leak into the protected space \d\.\de-\d\d; \d updates in",
        r"written to\s+runs/job",
        r"Null-space certificate: 14 layers",
    ):
        assert len(re.findall(said, whole.text)) == 1, f"{said} in:\n{whole.text}"
    for nothing in ("FLOPs", "eval mode", "Epoch 0", "max_epochs="):
        assert nothing not in whole.text
    assert not any(bars([line], label) for line in whole.lines for label in ("Training", "Validation", "Measuring"))


def test_there_is_one_bar_whatever_comes_between(whole: Terminal) -> None:
    assert sum(bars(screen, "Training") for screen in whole.screens) > 4
    for screen in whole.screens:
        for label in ("Training", "Validation", "Scoring general text", "Measuring before training"):
            assert bars(screen, label) <= 1, "\n".join(screen)
        assert not (bars(screen, "Validation") and bars(screen, "Scoring general text")), "\n".join(screen)
    shown = {line for screen in whole.screens for line in screen if bars([line], "Training")}
    assert any(re.search(r"\d of 8 steps, \d:\d\d left, reward \S+, answered \d+ %", line) for line in shown), shown
    assert max(map(len, shown)) < 80


def test_what_is_kept_of_an_interrupted_run_is_said_last(job: Path) -> None:
    sent: list[int] = []

    def interrupt(screen: list[str], child: int) -> None:
        if not sent and any(re.match(r"Training .*2 of 8 steps", line) for line in screen):
            os.kill(child, signal.SIGINT)
            sent.append(child)

    arguments = ["fit", "-c", "config.yaml", "--name=cut", "--trainer.limit_test_batches=0"]
    seen = in_terminal(job, lambda: main(arguments), watch=interrupt)
    assert seen.code != 0
    said = " ".join(seen.text.split())
    assert "state saved to runs/cut/checkpoints/last.ckpt. Go on with `--ckpt_path last`." in said
    assert "Traceback" not in seen.text
    # Where it stood when it was interrupted may stay, once, above what is said last.
    assert bars(seen.lines, "Training") <= 1, seen.text
    assert not bars(seen.lines, "Validation"), seen.text
    assert seen.text.rstrip().splitlines()[-1].startswith(("`--ckpt_path last`", "KeyboardInterrupt")), seen.text


@pytest.mark.parametrize("columns", [60, 80])
def test_a_width_left_over_from_another_terminal_leaves_no_copies(tmp_path: Path, columns: int) -> None:
    """`COLUMNS` wins over the terminal in rich: a line that is too long for the terminal could not be taken back."""

    def work() -> None:
        print("before")
        with rows_progress("Training", 3, unit="step") as advance:
            for _ in range(3):
                advance(note="reward 0.31, unsafe 45 %, accuracy 95 %, and many words more than there is room for")
                with rows_progress("Validation", 1) as validated:
                    validated()
                print("meanwhile")
        print("after")

    seen = in_terminal(tmp_path, work, columns=columns, environment={"COLUMNS": "120"})
    assert seen.lines == ["before", *["meanwhile"] * 3, "after"]
    assert any(bars(screen, "Training") for screen in seen.screens)
