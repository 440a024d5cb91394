"""Methods and sweeps are settings that `fit` takes, and change nothing that is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nspo_lightning.cli.jobs import CLI, cli_arguments
from nspo_lightning.compare.methods import METHODS, mixing_settings
from nspo_lightning.compare.plan import Budget, RunSpec, as_planned, main_grid
from nspo_lightning.compare.sweeps import make_sweep

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
CONFIG: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text())
BUDGET = Budget(steps=20, eval_every=5, stop_unsafe=0.01)
SKILLS = ["arithmetic", "strings", "format", "facts", "benign"]


def instantiated(spec: RunSpec, tmp_path: Path) -> CLI:
    arguments = spec.arguments(QUICKSTART, tmp_path, BUDGET, {})
    return CLI(**cli_arguments(), args=arguments[1:], run=False)


def projection(cli: CLI) -> Any:
    return next(c for c in cli.trainer.callbacks if type(c).__name__ == "NullSpaceProjection")  # type: ignore[attr-defined]


@pytest.mark.parametrize("spec", main_grid(CONFIG, list(METHODS), [0], [1e-3]), ids=lambda s: s.variant or s.method)
def test_every_method_is_a_fit_with_settings(spec: RunSpec, tmp_path: Path) -> None:
    cli = instantiated(spec, tmp_path)
    callback = projection(cli)
    assert callback.enabled is (spec.settings.get("nullspace.enabled") is not False)
    assert cli.model.settings.objective.beta == spec.settings.get("model.objective.beta", 0.0)
    steps = (callback.project_initialization, callback.project_gradients, callback.project_displacement)
    expected = {
        "gradient": (False, True, False),
        "displacement": (False, False, True),
        "init_only": (True, False, False),
        "init_contrast": (True, False, False),
    }
    assert steps == expected.get(spec.method, (True, True, True))
    assert callback.freeze_down is (spec.method == "b_only")
    assert callback.settings.form == ("soft" if spec.method == "soft" else "hard")
    subspace = spec.method if spec.method in {"random", "protected", "weights"} else "null"
    subspace = "to_learn" if spec.method == "init_contrast" else subspace
    assert callback.settings.subspace == subspace
    (optimizer,) = [cli.model.make_optimizer([torch.nn.Parameter(torch.zeros(1))])]
    decay = float(spec.variant.rpartition(" ")[2]) if spec.method == "decay" else 0.0
    assert optimizer.defaults["weight_decay"] == decay
    callbacks = {type(c).__name__: c for c in cli.trainer.callbacks}  # type: ignore[attr-defined]
    assert callbacks["Trajectory"].steps == 20
    assert cli.trainer.val_check_interval == 5
    assert ("OGPSA" in callbacks) is (spec.method == "ogpsa")
    trained = {"general_kl": "GRPO", "contrast_kl": "NSPO, contrast", "nspo_general_kl": "NSPO"}
    on_starts = spec.method in {"general_starts", "contrast_starts", "nspo_starts"}
    assert ("GeneralKL" in callbacks) is (spec.method in trained or on_starts)
    assert not on_starts or callbacks["GeneralKL"].start_weight == 1.0
    if spec.method in trained:
        assert spec.label == f"{trained[spec.method]} + {callbacks['GeneralKL'].coefficient:g} KL on general text"
    anchored = {
        "anchor": "GRPO",
        "nspo_anchor": "NSPO",
        "contrast_anchor": "NSPO, contrast",
        "nspo_anchor_starts": "NSPO",
        "nspo_anchor_mixed": "NSPO",
    }
    assert ("CurvatureAnchor" in callbacks) is (spec.method in anchored)
    if spec.method in anchored:
        anchor = callbacks["CurvatureAnchor"]
        more = ", half on starts of answers" if anchor.start_weight == 0.5 else ""
        more += ", general prompts mixed in" if METHODS[spec.method].mixes_general else ""
        assert spec.label == f"{anchored[spec.method]} + curvature anchor {anchor.coefficient:g}{more}"


def test_a_method_is_what_it_is_called_whatever_the_configuration_has(tmp_path: Path) -> None:
    other = {**CONFIG, "nullspace": {"enabled": False, "criterion": "energy", "threshold": 0.1}}
    other["trainer"] = {**CONFIG["trainer"], "max_steps": 7, "max_time": "00:00:10:00"}
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(other))
    plan = as_planned(main_grid(other, ["base", "grpo", "nspo", "contrast", "init_contrast"], [0], [1e-3]), other)
    seen: dict[str, Any] = {}
    for spec in plan:
        arguments = spec.arguments(path, tmp_path, BUDGET, {})
        cli = CLI(**cli_arguments(), args=arguments[1:], run=False)
        held = projection(cli)
        seen[spec.method] = (held.enabled, held.settings.criterion, held.settings.threshold, cli.trainer.max_steps)
        timed = {type(callback).__name__ for callback in cli.trainer.callbacks} & {"Timer"}  # type: ignore[attr-defined]
        assert timed == ({"Timer"} if spec.method == "base" else set())
        assert spec.is_projected is (spec.method in {"nspo", "contrast"})
    assert seen == {
        "base": (False, "energy", 0.1, 0),
        "grpo": (False, "energy", 0.1, -1),
        "nspo": (True, "energy", 0.1, -1),
        "contrast": (True, "contrast", None, -1),
        "init_contrast": (True, "rank", 4, -1),
    }
    plain = main_grid(CONFIG, list(METHODS), [0], [1e-3])
    assert as_planned(plain, CONFIG) == plain, "what needs no change has the name and the digest that it had"


def test_coefficients_are_runs_of_their_own_with_names_of_their_own() -> None:
    plan = main_grid(CONFIG, ["grpo", "general_kl", "decay"], [0, 1], [1e-3, 2e-3])
    assert len({spec.name for spec in plan}) == len(plan) == (1 + 4 + 3) * 2 * 2
    coefficients = {spec.callbacks[0]["init_args"]["coefficient"] for spec in plan if spec.method == "general_kl"}
    assert coefficients == {0.1, 1.0, 10.0, 100.0}
    decays = {spec.settings["model.optimizer.init_args.weight_decay"] for spec in plan if spec.method == "decay"}
    assert decays == {0.1, 0.3, 1.0}


def test_mixing_general_prompts_changes_training_and_not_what_is_evaluated(tmp_path: Path) -> None:
    evaluated, trained = [], []
    for name in ("grpo", "grpo_mixed"):
        (spec,) = main_grid(CONFIG, [name], [0], [1e-3])
        cli = instantiated(spec, tmp_path)
        cli.datamodule.tokenizer = cli.model.tokenizer
        cli.datamodule.prepare_data()
        cli.datamodule.setup("fit")
        rows = [cli.datamodule.eval_rows(split) for split in ("validation", "test")]
        evaluated.append([[row.prompt for row in part] for split in rows for part in split])
        loader = cli.datamodule.train_dataloader()
        trained.append([kind for batch in loader for kind in batch["columns"]["kind"]])
    assert evaluated[0] == evaluated[1]
    assert set(trained[0]) == {"harmful"}
    assert abs(trained[1].count("benign") - len(trained[1]) / 2) < 12  # but for the last, partial batch


def test_a_mixture_that_would_change_the_evaluation_is_refused() -> None:
    config = {"model": {"reward": "x"}, "data": {"safety": "rows.jsonl", "general": "toy/general"}}
    with pytest.raises(ValueError, match="safety_val"):
        mixing_settings(config)


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("calibration", "threshold")), "data", "rank"]
)
def test_every_variant_of_a_sweep_parses_and_has_a_name_of_its_own(name: str, tmp_path: Path) -> None:
    plan = make_sweep(name, CONFIG, SKILLS).plan([0, 1], 1e-3)
    assert len({spec.name for spec in plan}) == len(plan)
    for spec in plan[: len(plan) // 2 + 1]:
        parser = CLI(**cli_arguments(), args=spec.arguments(QUICKSTART, tmp_path, BUDGET, {})[1:], run=False)
        for option, value in spec.settings.items():
            if option.startswith("nullspace.") and option != "nullspace.without_domains":
                found = parser.config["nullspace"][option.removeprefix("nullspace.")]
                assert found == value, option


def test_the_grid_runs_every_method_before_the_next_seed_and_the_base_once() -> None:
    plan = main_grid(CONFIG, ["base", "nspo", "grpo"], [0, 1], [1e-4, 2e-4])
    assert [(s.method, s.seed, s.learning_rate) for s in plan[:5]] == [
        ("base", 0, None),
        ("nspo", 0, 1e-4),
        ("grpo", 0, 1e-4),
        ("nspo", 1, 1e-4),
        ("grpo", 1, 1e-4),
    ]
    assert len(plan) == 1 + 2 * 2 * 2
    with pytest.raises(ValueError, match="must be among"):
        main_grid(CONFIG, ["ngpo"], [0], [1e-4])
