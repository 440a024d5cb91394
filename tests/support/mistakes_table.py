"""User mistakes: what was typed, the exit code, and what the message must say (a regular expression)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One mistake."""

    arguments: tuple[str, ...]
    says: str
    code: int = 1


def fit(*arguments: str, says: str, code: int = 1) -> Mistake:
    """A mistake in a `fit` of the small job."""
    return Mistake(("fit", "-c", "config.yaml", *arguments), says, code)


def command(*arguments: str, says: str, code: int = 1) -> Mistake:
    """A mistake in another command."""
    return Mistake(arguments, says, code)


REWARD = "--model.reward=nspo_lightning.rewards.OutcomeReward"
JUDGED = (REWARD, "--model.reward.judge=nspo_lightning.rewards.ServerJudge", "--model.reward.judge.model=m")
SERVED = (
    "--model.rollout_server.base_url=http://127.0.0.1:9/v1",
    "--model.rollout_server.model=base",
    "--model.rollout_server.adapter_folder=adapters",
)

CONFIG = {
    "unknown option": fit("--model.grup_size=4", says="Did you mean `--model.group_size`?", code=2),
    "number for settings": fit(
        "--model.dynamic_sampling=4", says="expected settings.*mean `--model.dynamic_sampling.max_factor 4`", code=2
    ),
    "negative learning rate": fit(
        "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=-1", says="model.optimizer.*learning rate: -1"
    ),
    "a package that is not there": fit("--trainer.logger=lightning.pytorch.loggers.WandbLogger", says="wandb"),
    "run folder in a file": fit("--trainer.default_root_dir=config.yaml/runs", says="config.yaml"),
    "text for a number": fit("--model.group_size=four", says="group_size", code=2),
    "unknown subcommand": command("fti", says="fti", code=2),
    "config not there": command("fit", "-c", "nowhere.yaml", says="nowhere.yaml", code=2),
    "config is no YAML": command(
        "fit", "-c", "broken/yaml.yaml", says="broken/yaml.yaml, line 2: this is no YAML", code=2
    ),
    "config is a list": command("fit", "-c", "broken/list.yaml", says="list.yaml holds a list", code=2),
    "group of one": fit("--model.group_size=1", says="`group_size` must be at least 2, got 1"),
    "greedy training": fit("--model.sampling.temperature=0", says="greedy completions"),
    "negative temperature": fit("--model.sampling.temperature=-1", says="temperature"),
    "top_p above one": fit("--model.sampling.top_p=1.5", says="top_p"),
    "no new tokens": fit("--model.sampling.max_new_tokens=0", says="max_new_tokens"),
    "graphs on a CPU": fit("--model.sampling.decoding=graphs", says="`sampling.decoding: graphs`.*'cpu'.*auto"),
    "unknown decoding": fit("--model.sampling.decoding=fast", says="decoding", code=2),
    "no passes": fit("--model.num_iterations=0", says="`num_iterations` must be at least 1"),
    "no microbatch": fit("--model.tokens_per_microbatch=0", says="tokens_per_microbatch"),
    "unknown loss": fit("--model.objective.loss_type=ppo", says="loss_type", code=2),
    "negative KL coefficient": fit("--model.objective.beta=-1", says="beta"),
    "negative clip range": fit("--model.objective.clip_epsilon=-0.2", says="epsilon"),
    "unknown advantage scale": fit("--model.scale_rewards=sometimes", says="scale_rewards", code=2),
    "reward class misspelt": fit(
        "--model.reward=nspo_lightning.rewards.RefuselReward",
        says="mean `nspo_lightning.rewards.RefusalReward`",
        code=2,
    ),
    "optimizer misspelt": fit("--model.optimizer=torch.optim.AdamX", says="AdamX", code=2),
    "callback misspelt": fit("--trainer.callbacks=[{class_path: nspo_lightning.callbacks.Nope}]", says="Nope", code=2),
    "seed is a word": fit("--seed_everything=tomorrow", says="seed_everything", code=2),
    "unknown precision": fit("--trainer.precision=12", says="precision", code=2),
    "pure half precision": fit("--trainer.precision=16-true", says="precision|float32"),
    "unknown strategy": fit("--trainer.strategy=magic", says="magic"),
    "a GPU that is not there": fit("--trainer.accelerator=cuda", says="(?i)cuda"),
    "unknown accelerator": fit("--trainer.accelerator=quantum", says="quantum"),
    "no devices": fit("--trainer.devices=0", says="devices"),
    "validation never comes": fit("--trainer.val_check_interval=1000", says="val_check_interval"),
    "negative clipping": fit("--trainer.gradient_clip_val=-1", says="gradient_clip_val"),
    "negative dev run": fit("--trainer.fast_dev_run=-1", says="fast_dev_run"),
    "dev run of a config with a typing error": fit(
        "--trainer.fast_dev_run=true", "--model.policy.lora.rank=4", says="rank", code=2
    ),
    "dev run of data that is not there": fit(
        "--trainer.fast_dev_run=true", "--data.safety=nothing.jsonl", says="nothing.jsonl"
    ),
    "negative epochs": fit("--trainer.max_epochs=-3", says="max_epochs"),
    "option without a value": fit("--model.group_size", says="group_size", code=2),
    "no accumulation": fit("--trainer.accumulate_grad_batches=0", says="accumulate_grad_batches"),
}
NULLSPACE = {
    "unknown criterion": fit("--nullspace.criterion=guess", says="criterion", code=2),
    "negative threshold": fit("--nullspace.threshold=-1", says="threshold"),
    "everything protected": fit(
        "--nullspace.criterion=absolute", "--nullspace.threshold=1e-30", says="(?i)no null direction"
    ),
    "unknown subspace": fit("--nullspace.subspace=lucky", says="subspace", code=2),
    "unknown unprotected": fit("--nullspace.unprotected=maybe", says="unprotected", code=2),
    "no softness": fit("--nullspace.form=soft", "--nullspace.softness=0", says="softness"),
    "null share above one": fit("--nullspace.min_null_share=1.5", says="min_null_share"),
    "targets that match nothing": fit(
        "--nullspace.target_modules=no_such_layer", says="cannot be held in the null space.*target_modules"
    ),
    "domain that is not there": fit("--nullspace.without_domains=[poetry]", says="poetry"),
    "all domains left out": fit("--nullspace.without_domains=[general]", says="domain"),
    "tiny memory budget": fit("--nullspace.memory_budget_gb=1e-9", says="memory_budget_gb"),
    "basis not there": fit("--nullspace.calibration=nowhere.safetensors", says="nowhere.safetensors"),
    "basis is text": fit("--nullspace.calibration=broken/text.safetensors", says="text.safetensors"),
    "basis is a pickle": fit("--nullspace.calibration=broken/pickle.safetensors", says="pickle.safetensors"),
    "basis of another project": fit(
        "--nullspace.calibration=broken/of_another_project.safetensors", says="of_another_project.safetensors"
    ),
    "basis cut off": fit("--nullspace.calibration=broken/cut.safetensors", says="cut.safetensors"),
    "basis is a folder": fit("--nullspace.calibration=broken/folder", says="folder"),
}
DATA = {
    "data not there": fit("--data.safety=nothing.jsonl", says="nothing.jsonl"),
    "data empty": fit("--data.safety=broken/empty.jsonl", says="empty.jsonl"),
    "data cut off": fit("--data.safety=broken/cut.jsonl", says="cut.jsonl.*2"),
    "data in another encoding": fit("--data.safety=broken/latin.csv", says="latin.csv.*UTF-8"),
    "data is binary": fit("--data.safety=broken/binary.jsonl", says="binary.jsonl"),
    "data without a prompt": fit("--data.safety=broken/column.jsonl", says="column.jsonl.*text_of_it"),
    "prompt is null": fit("--data.safety=broken/null.jsonl", says="null.jsonl"),
    "prompt is a number": fit("--data.safety=broken/number.jsonl", says="number.jsonl"),
    "prompt is blank": fit("--data.safety=broken/blank.jsonl", says="blank.jsonl"),
    "folder without data": fit("--data.general=broken/folder", says="folder"),
    "file of another kind": fit("--data.general=broken/notes.txt", says="notes.txt"),
    "unknown preset": fit("--data.safety={preset: advbunch}", says="advbunch"),
    "no source in a list": fit("--data.safety=[]", says="empty list"),
    "no share of the rows": fit("--data.safety={path: safety.jsonl, fraction: 0}", says="`fraction` must be in"),
    "share and count": fit("--data.safety={path: safety.jsonl, fraction: 0.5, count: 3}", says="both given"),
    "a column that is not there": fit("--data.safety={path: safety.jsonl, prompt_column: goal}", says="goal"),
    "no batch": fit("--data.batch_size=0", says="batch_size"),
    "negative split": fit("--data.val_size=-1", says="val_size"),
    "prompts all too long": fit("--data.max_prompt_tokens=1", says="max_prompt_tokens|longer than 1"),
    "nothing to calibrate on": fit("--data.calibration_size=0", says="`calibration_size` must be at least 1"),
    "unknown calibration text": fit("--data.calibration_text=poem", says="calibration_text", code=2),
    "a world that is not there": fit("--data.safety=toy/harmfull", says="harmfull"),
}
MODEL = {
    "model not there": fit("--model.policy.path=/nowhere", says="found nothing at '/nowhere'"),
    "GGUF not there": fit("--model.policy.path=models/m.Q4_K_M.gguf", says="expected a GGUF file, found nothing there"),
    "file that is no GGUF": fit("--model.policy.path=broken/notes.txt", says="notes.txt.*no GGUF one"),
    "GGUF that is none": fit("--model.policy.path=broken/no.gguf", says="no.gguf.*no GGUF one"),
    "GGUF cut off": fit("--model.policy.path=broken/cut.gguf", says="cut.gguf.*cut off or damaged.*Download it again"),
    "GGUF of an unknown architecture": fit("--model.policy.path=broken/other.gguf", says="architecture 'oracle'"),
    "GGUF not in the folder": fit(
        "--model.policy.path=broken/folder", "--model.policy.gguf_file=m.gguf", says="no GGUF file"
    ),
    "folder without a model": fit("--model.policy.path=broken/folder", says="broken/folder"),
    "unknown quantization": fit("--model.policy.quantization=int3", says="quantization", code=2),
    "unknown dtype": fit("--model.policy.dtype=float7", says="dtype", code=2),
    "tokenizer without a chat template": fit("--model.policy.path=broken/mute", says="(?i)chat template"),
    "weights are a pickle": fit("--model.policy.path=broken/pickled", says="broken/pickled"),
    "weights cut off": fit("--model.policy.path=broken/cut_model", says="broken/cut_model"),
    "DoRA": fit("--model.policy.lora.use_dora=true", says="use_dora", code=2),
    "negative LoRA alpha": fit("--model.policy.lora.alpha=-1", says="alpha"),
    "template that is no Jinja": fit("--model.policy.chat_template={% for", says="chat_template|template"),
    "LoRA of rank 0": fit("--model.policy.lora.r=0", says="rank|`r`|lora"),
    "LoRA on nothing": fit("--model.policy.lora.target_modules=[no_proj]", says="no_proj"),
    "dropout of two": fit("--model.policy.lora.dropout=2", says="dropout"),
    "no room for completions": fit("--model.sampling.max_new_tokens=256", says="No room left for completions"),
    "4-bit without an adapter": fit("--model.policy.quantization=nf4", "--model.policy.lora=null", says="lora|4-bit"),
    "adapter not there": fit("--model.policy.adapter=/nowhere/adapter", says="/nowhere/adapter"),
    "template not there": fit("--model.policy.chat_template=broken/nothing.jinja", says="chat_template|template"),
}
CHECKPOINT = {
    "checkpoint not there": fit("--ckpt_path=nowhere.ckpt", says="nowhere.ckpt"),
    "checkpoint is text": fit("--ckpt_path=broken/text.ckpt", says="text.ckpt"),
    "checkpoint with planted code": fit("--ckpt_path=broken/planted.ckpt", says="planted.ckpt"),
    "checkpoint cut off": fit("--ckpt_path=broken/cut.ckpt", says="cut.ckpt.*only a part"),
    "basis for a checkpoint": fit("--ckpt_path=broken/of_another_project.safetensors", says="of_another_project"),
    "best of no run": command("validate", "-c", "config.yaml", "--ckpt_path=best", says="not there"),
    "checkpoint of another project": fit("--ckpt_path=broken/other.ckpt", says="not written by this project"),
}
JUDGE = {
    "reward without a module": fit(
        "--model.reward=nspo_lightning.rewards.FunctionReward", "--model.reward.path=nothing.at_all", says="nothing"
    ),
    "judge that does not answer": fit(
        "--model.reward=nspo_lightning.rewards.OutcomeReward",
        "--model.reward.judge=nspo_lightning.rewards.ServerJudge",
        "--model.reward.judge.model=m",
        "--model.reward.judge.base_url=http://127.0.0.1:9/v1",
        "--model.reward.judge.max_retries=0",
        says="127.0.0.1:9",
    ),
    "hosted judge without a key": fit(
        *JUDGED,
        "--model.reward.judge.base_url=https://api.openai.com/v1",
        "--model.reward.judge.api_key_env=NO_SUCH_KEY_HERE",
        says="NO_SUCH_KEY_HERE is not set",
    ),
    "judge without a model": fit(
        REWARD, "--model.reward.judge=nspo_lightning.rewards.ServerJudge", says="model", code=2
    ),
    "judge at no address": fit(*JUDGED, "--model.reward.judge.base_url=localhost", says="must be an address"),
    "judge's template without the completion": fit(
        *JUDGED, "--model.reward.judge.template=Is {prompt} bad?", says="completion"
    ),
    "judge of unknown labels": fit(*JUDGED, "--model.reward.judge.reply_format=colours", says="reply_format", code=2),
    "judge's threshold above one": fit(*JUDGED, "--model.reward.judge.threshold=7", says="threshold"),
    "judge without time": fit(*JUDGED, "--model.reward.judge.request_timeout_s=0", says="request_timeout_s"),
    "guard not there": fit(
        REWARD,
        "--model.reward.judge={class_path: nspo_lightning.rewards.GuardJudge, init_args: {model: /nowhere/guard}}",
        says="/nowhere/guard",
    ),
    "nothing to judge": command("judge", "-c", "config.yaml", "--input=nowhere.jsonl", says="nowhere.jsonl"),
    "judge without completions": command("judge", "-c", "config.yaml", "--input=safety.jsonl", says="completion"),
}
SERVER = {
    "rollout server does not answer": fit(*SERVED, says="No rollout server answers at http://127.0.0.1:9/v1"),
    "rollout server at no address": fit(*SERVED, "--model.rollout_server.base_url=localhost:8000", says="an address"),
    "rollout server without a model": fit(*SERVED, "--model.rollout_server.model=", says="rollout_server.model"),
    "rollout server without a folder": fit(SERVED[0], SERVED[1], says="adapter_folder", code=2),
    "rollout server with a password": fit(
        *SERVED, "--model.rollout_server.base_url=http://me:word@host/v1", says="name or password"
    ),
    "rollout server without an adapter": fit(*SERVED, "--model.policy.lora=null", says="`policy.lora`"),
    "rollout server without time": fit(*SERVED, "--model.rollout_server.timeout_s=0", says="timeout_s"),
    "importance capped below one": fit(*SERVED, "--model.rollout_server.importance_cap=0.5", says="importance_cap"),
}
OTHER = {
    "compare without a folder": command("compare", "--config=config.yaml", says="out", code=2),
    "compare an unknown method": command(
        "compare", "--config=config.yaml", "--out=cmp", "--methods=[magic]", says="'magic'"
    ),
    "compare no config": command("compare", "--config=nowhere.yaml", "--out=cmp", says="nowhere.yaml", code=2),
    "compare nothing finished": command(
        "compare",
        "--config=config.yaml",
        "--out=cmp",
        "--methods=[nspo]",
        "--only_report=true",
        says="nothing to report",
    ),
    "compare an unknown sweep": command(
        "compare", "--config=config.yaml", "--out=cmp", "--sweep=everything", says="sweep", code=2
    ),
    "test into a file": command(
        "test", "-c", "config.yaml", "--trainer.default_root_dir=config.yaml/r", says="config.yaml"
    ),
    "judge into nowhere": command(
        "judge", "-c", "config.yaml", "--input=scored.jsonl", "--output=config.yaml/x", says="config.yaml"
    ),
    "calibrate into nowhere": command(
        "calibrate", "-c", "config.yaml", "--out=/proc/nowhere/basis.safetensors", says="/proc/nowhere"
    ),
    "predict without a model": command("predict", "-c", "config.yaml", "--ckpt_path=nowhere.ckpt", says="nowhere.ckpt"),
}
PAIR = "{class_path: nspo_lightning.attacks.Pair, init_args: {model: m, base_url: 'http://127.0.0.1:9/v1'"
ATTACKS = {
    "unknown attack": command(
        "test", "-c", "config.yaml", "--attacks=role_pley", says="Did you mean `role_play`.*base64"
    ),
    "unknown attack in validation": fit("--data.val_attacks=[prefil_5]", says="no attack 'prefil_5'.*prefill_3"),
    "compare under an unknown attack": command(
        "compare", "--config=config.yaml", "--out=cmp", "--attacks=[nothing]", says="There is no attack 'nothing'"
    ),
    "template without a place": command(
        "predict", "-c", "config.yaml", "--attacks=broken/templates.yaml", says=r"no place for the request.*\{request\}"
    ),
    "templates not there": command("test", "-c", "config.yaml", "--attacks=[nowhere.yaml]", says="nowhere.yaml"),
    "a prefill as data": fit(
        "--data.safety={path: safety.jsonl, attacks: [prefill_5]}", says="`prefill_5` does something else"
    ),
    "attacker server that is down": command(
        "test",
        "-c",
        "config.yaml",
        f"--attacks=[{PAIR}, max_retries: 0}}}}]",
        says="m at http://127.0.0.1:9/v1 gave",
    ),
    "more than every group begun": fit("--model.prefixes.share=1.5", says="`prefixes.share` must lie in"),
    "tamper with no steps": command("tamper", "-c", "config.yaml", "--steps=0", says="`steps` must be positive"),
}
MISTAKES = {**ATTACKS, **CONFIG, **NULLSPACE, **DATA, **MODEL, **CHECKPOINT, **JUDGE, **SERVER, **OTHER}
