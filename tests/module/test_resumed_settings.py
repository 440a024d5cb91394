"""A run goes on from a checkpoint with the settings that it was written with, bit for bit, or says what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from tiny_jobs import adapter, datamodule, module, trainer

from nspo_lightning.callbacks import ExactResume
from nspo_lightning.checkpoints import STATE_KEY
from nspo_lightning.cli.trainer import Trainer
from nspo_lightning.grpo import ObjectiveConfig
from nspo_lightning.policy.identity import policy_identity
from nspo_lightning.policy.settings import LoraSettings, PolicyError, PolicySettings
from nspo_lightning.rollout import SamplingConfig


def saved(path: Path, folder: Path, accumulate: int = 1, **kwargs: Any) -> Path:
    """A checkpoint of a run of one update."""
    run = trainer(folder, steps=1, accumulate_grad_batches=accumulate)
    run.fit(module(path, **kwargs), datamodule())
    run.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def objective(**values: Any) -> dict[str, Any]:
    return {"objective": ObjectiveConfig(**values)}


def adamw(kind: Any = torch.optim.AdamW, **values: Any) -> dict[str, Any]:
    return {"optimizer": lambda parameters: kind(parameters, **{"lr": 1e-2, **values})}


def cosine(t_max: int) -> Any:
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, t_max)


DIFFERING: list[tuple[dict[str, Any], int, str]] = [
    ({"group_size": 8}, 1, "`model.group_size` 4 -> 8"),
    ({"scale_rewards": "none"}, 1, "`model.scale_rewards` group -> none"),
    ({"num_iterations": 2}, 1, "`model.num_iterations` 1 -> 2"),
    ({"num_minibatches": 2}, 1, "`model.num_minibatches` 1 -> 2"),
    ({"sampling": SamplingConfig(max_new_tokens=7)}, 1, "`model.sampling.max_new_tokens` 6 -> 7"),
    ({"sampling": SamplingConfig(max_new_tokens=6, min_p=0.1)}, 1, "`model.sampling.min_p` null -> 0.1"),
    (objective(loss_type="dapo"), 1, "`model.objective.loss_type` grpo -> dapo"),
    (objective(ratio_level="sequence"), 1, "`model.objective.ratio_level` token -> sequence"),
    (objective(beta=0.1), 1, "`model.objective.beta` 0.0 -> 0.1"),
    (objective(clip_epsilon=0.3), 1, "`model.objective.clip_epsilon` 0.2 -> 0.3"),
    (objective(clip_epsilon_high=0.3), 1, "`model.objective.clip_epsilon_high` null -> 0.3"),
    (objective(delta=2.0), 1, "`model.objective.delta` null -> 2.0"),
    (objective(mask_truncated=True), 1, "`model.objective.mask_truncated` False -> True"),
    ({}, 2, "`trainer.accumulate_grad_batches` 1 -> 2"),
    ({"lr": 2e-2}, 1, "`model.optimizer.lr` 0.01 -> 0.02"),
    (adamw(weight_decay=0.1), 1, "`model.optimizer.weight_decay` 0.01 -> 0.1"),
    (adamw(betas=(0.8, 0.9)), 1, "`model.optimizer.betas` (0.9, 0.999) -> (0.8, 0.9)"),
    ({"scheduler": cosine(40)}, 1, "`model.scheduler` null -> torch.optim.lr_scheduler.CosineAnnealingLR"),
]


def test_settings_that_differ_are_named_old_and_new(tiny_llama: Path, tmp_path: Path) -> None:
    path = saved(tiny_llama, tmp_path)
    for kwargs, accumulate, message in DIFFERING:
        run, other = trainer(tmp_path, steps=2, accumulate_grad_batches=accumulate), module(tiny_llama, **kwargs)
        with pytest.raises(ValueError, match="begin a new run from the trained adapter") as error:
            run.fit(other, datamodule(), ckpt_path=path)
        assert message in str(error.value)
        assert str(error.value).count("->") == 1


def test_a_schedule_goes_on_as_it_was_asked_or_says_what_differs(tiny_llama: Path, tmp_path: Path) -> None:
    """Lightning restores its state, so another one would change nothing, in silence."""

    def chained(milestone: int, t_max: int) -> Any:
        def make(optimizer: Any) -> Any:
            warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=milestone)
            return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine(t_max)(optimizer)], [milestone])

        return make

    path = saved(tiny_llama, tmp_path, scheduler=chained(3, 40))
    other = module(tiny_llama, scheduler=chained(3, 40))
    trainer(tmp_path, steps=2).fit(other, datamodule(), ckpt_path=path)
    assert other.trainer.global_step == 2
    with pytest.raises(ValueError, match=r"`model.scheduler._schedulers\[1\].T_max` 40 -> 50\. "):
        trainer(tmp_path, steps=2).fit(module(tiny_llama, scheduler=chained(3, 50)), datamodule(), ckpt_path=path)
    with pytest.raises(ValueError, match=r"`model.optimizer` torch.optim.adamw.AdamW -> torch.optim.sgd.SGD, "):
        trainer(tmp_path, steps=2).fit(module(tiny_llama, **adamw(kind=torch.optim.SGD)), datamodule(), ckpt_path=path)
    fused = module(tiny_llama, scheduler=chained(3, 40), **adamw(foreach=True))
    trainer(tmp_path, steps=2).fit(fused, datamodule(), ckpt_path=path)
    assert fused.trainer.global_step == 2, "how it is computed may differ"


def test_all_that_differ_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    path = saved(tiny_llama, tmp_path)
    other = module(tiny_llama, group_size=2, **objective(loss_type="bnpo"))
    with pytest.raises(ValueError, match=r"`model.group_size` 4 -> 2, `model.objective.loss_type` grpo -> bnpo"):
        trainer(tmp_path, steps=2).fit(other, datamodule(), ckpt_path=path)


def test_settings_that_change_no_number_may_differ_and_measuring_asks_for_none(
    tiny_llama: Path, tmp_path: Path
) -> None:
    path = saved(tiny_llama, tmp_path)
    sampling = SamplingConfig(max_new_tokens=6, decoding="static")
    assert sampling == SamplingConfig(max_new_tokens=6), "a server is asked for the same"
    other = module(
        tiny_llama, tokens_per_microbatch=64, share_prefix=False, general_max_new_tokens=3, sampling=sampling
    )
    trainer(tmp_path, steps=2).fit(other, datamodule(), ckpt_path=path)
    assert other.trainer.global_step == 2
    run = trainer(tmp_path, limit_val_batches=1.0)
    run.validate(module(tiny_llama, group_size=2), datamodule(), ckpt_path=path, verbose=False)


def test_a_checkpoint_without_settings_still_resumes(tiny_llama: Path, tmp_path: Path) -> None:
    path = saved(tiny_llama, tmp_path)
    content = torch.load(path, weights_only=True)
    for name in ("settings", "adapter"):
        del content[STATE_KEY][name]
    content[STATE_KEY]["buffers"] = [None]
    torch.save(content, path)
    other = module(tiny_llama)
    trainer(tmp_path, steps=2).fit(other, datamodule(), ckpt_path=path)
    assert other.trainer.global_step == 2


@pytest.mark.parametrize("job", ["fit", "validate"])
def test_an_adapter_that_is_scaled_in_another_way_is_refused(tiny_llama: Path, tmp_path: Path, job: str) -> None:
    """Its weights fit, and would mean another policy."""
    path = saved(tiny_llama, tmp_path)
    lora = LoraSettings(r=4, alpha=16)
    settings = PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32", lora=lora)
    run = trainer(tmp_path, steps=2, limit_val_batches=1.0)
    with pytest.raises(PolicyError, match=r"`model.policy.lora.alpha` 8 -> 16"):
        getattr(run, job)(module(tiny_llama, policy=settings), datamodule=datamodule(), ckpt_path=path)


@pytest.mark.parametrize(("iterations", "minibatches", "batch_size"), [(2, 1, 2), (2, 2, 3)])
def test_accumulated_rollouts_resume_bitwise_from_every_update(
    tiny_llama: Path, tmp_path: Path, iterations: int, minibatches: int, batch_size: int
) -> None:
    """In the middle of a block and of an epoch, and in its last, shorter block."""
    repeat = iterations * minibatches

    def fit(ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        policy = module(tiny_llama, num_iterations=iterations, num_minibatches=minibatches)
        folder = tmp_path / ("again" if ckpt_path else "whole")
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        pl.seed_everything(3)
        run = trainer(
            tmp_path,
            steps=-1,
            max_epochs=2,
            kind=Trainer,
            accumulate_grad_batches=2,
            callbacks=[ExactResume(), keep],
            enable_checkpointing=True,
        )
        run.fit(policy, datamodule(batch_size=batch_size, repeat_batches=repeat), ckpt_path=ckpt_path)
        return adapter(policy)

    whole = fit()
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert len(checkpoints) > 4
    for path in checkpoints[:-1]:
        again = fit(path)
        assert all(torch.equal(value, again[name]) for name, value in whole.items()), path.name


def test_a_changing_number_of_accumulated_batches_needs_one_step_a_rollout(tiny_llama: Path, tmp_path: Path) -> None:
    schedule = GradientAccumulationScheduler({0: 1, 1: 2})
    run = trainer(tmp_path, steps=2, callbacks=[schedule])
    with pytest.raises(MisconfigurationException, match="made for one number"):
        run.fit(module(tiny_llama, num_iterations=2), datamodule(repeat_batches=2))


def test_batches_that_come_too_seldom_are_said(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"some prompts are never answered. Set `repeat_batches=2`"):
        trainer(tmp_path, steps=1).fit(module(tiny_llama, num_iterations=2), datamodule())


def with_template(path: Path, template: Path | str) -> PolicySettings:
    lora = LoraSettings(r=4, alpha=8)
    return PolicySettings(path=str(path), quantization="none", dtype="float32", lora=lora, chat_template=str(template))


TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


def test_a_chat_template_is_what_it_says_wherever_it_is_given(tiny_llama: Path, tmp_path: Path) -> None:
    file, moved = tmp_path / "a.jinja", tmp_path / "b.jinja"
    file.write_text(TEMPLATE)
    moved.write_text(TEMPLATE)
    path = saved(tiny_llama, tmp_path, policy=with_template(tiny_llama, file))
    identities = []
    for same in (file, moved, TEMPLATE):
        other = module(tiny_llama, policy=with_template(tiny_llama, same))
        trainer(tmp_path, steps=2).fit(other, datamodule(), ckpt_path=path)
        assert other.trainer.global_step == 2
        identities.append(policy_identity(other, None)["model"])
    assert identities[0] == identities[1] == identities[2]
    file.write_text("Hear. " + TEMPLATE)
    edited = module(tiny_llama, policy=with_template(tiny_llama, file))
    with pytest.raises(ValueError, match=r"`model.policy.chat_template \(a hash of its text\)` \w{16} -> \w{16}\. "):
        trainer(tmp_path, steps=2).fit(edited, datamodule(), ckpt_path=path)
    assert policy_identity(edited, None)["model"] != identities[0]
