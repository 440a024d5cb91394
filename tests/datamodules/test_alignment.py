"""The datamodule of a whole run: batches, held-out rows, calibration, Lightning's own loops."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from nspo_lightning.callbacks.null_space.basis_source import calibration_batches
from nspo_lightning.datamodules import AlignmentDataModule, DataError, GeneralDataModule, PromptSource
from nspo_lightning.datamodules.sources.source import Sources
from nspo_lightning.evaluation.loaders import GENERAL, HARMFUL
from nspo_lightning.nullspace import TO_LEARN, BasisSettings
from nspo_lightning.nullspace.domains import are_starts, starts_of


@pytest.fixture
def files(tmp_path):
    with (tmp_path / "harmful.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["goal", "target"])
        writer.writerows([f"Describe forbidden thing {i}", f"Sure, thing {i}"] for i in range(50))
    maths = [{"question": f"What is {i} plus {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(40)]
    (tmp_path / "maths.jsonl").write_text("".join(json.dumps(row) + "\n" for row in maths))
    tasks = [{"instruction": f"Name colour {i}", "input": "", "output": f"colour {i}"} for i in range(60)]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    return tmp_path


@pytest.fixture
def make(files, tokenizer):
    def build(**options):
        options = {"tokenizer": tokenizer, "batch_size": 4, "eval_batch_size": 3} | options
        general: Sources = [str(files / "maths.jsonl"), str(files / "tasks.json")]
        return AlignmentDataModule(str(files / "harmful.csv"), general, **options)

    return build


@pytest.fixture
def fit(make, tokenizer, tmp_path):
    """Train a recorder; the datamodule takes the module's tokenizer."""

    def run(steps, ckpt=None, stop_at=None, **options):
        module = Recorder(tokenizer, stop_at)
        run = trainer(tmp_path, max_steps=steps, **options)
        run.fit(module, datamodule=make(repeat_batches=2, seed=3, tokenizer=None), ckpt_path=ckpt)
        return module, run

    return run


def test_training_batches_have_the_agreed_form(make, tokenizer):
    batch = next(iter(make().train_dataloader()))
    assert set(batch) == {"prompt", "prompt_ids", "prompt_mask", "columns"}
    assert batch["prompt_ids"].dtype == torch.long
    assert batch["prompt_mask"].dtype == torch.bool
    for prompt, ids, mask in zip(batch["prompt"], batch["prompt_ids"], batch["prompt_mask"], strict=True):
        assert tokenizer.decode(ids[mask]) == f"<|user|>{prompt}<|end|><|assistant|>"
        assert mask[-1], "left padding: the last position is a real token"
    assert batch["columns"]["kind"] == ["harmful"] * 4
    assert batch["columns"]["skill"] == ["advbench"] * 4


def test_every_row_lands_in_one_split_and_training_sees_no_held_out_prompt(make):
    data = make()
    train = [row.key for row in data.train_dataloader().rows]
    held = [row.key for loader in (data.val_dataloader()[0], data.test_dataloader()[0]) for row in loader.rows]
    assert sorted(train + held) == sorted(f"Describe forbidden thing {i}" for i in range(50))
    assert len(held) == 10
    calibrated = {row.key for row in data.general.calibration_rows()}
    general_held = {row.key for split in ("validation", "test") for row in data.eval_rows(split)[1]}
    assert not calibrated & general_held
    assert len(calibrated) + len(general_held) == 100


def test_a_loader_holds_what_its_number_says(make):
    data = make()
    for loaders, split in ((data.val_dataloader(), "validation"), (data.test_dataloader(), "test")):
        assert {row.kind for row in loaders[HARMFUL].rows} == {"harmful"}
        assert {row.kind for row in loaders[GENERAL].rows} == {"benign"}
        assert [loader.rows for loader in loaders] == list(data.eval_rows(split))


def test_evaluation_rows_carry_answer_and_skill(make):
    columns = [batch["columns"] for batch in make().test_dataloader()[1]]
    skills = [skill for part in columns for skill in part["skill"]]
    answers = [answer for part in columns for answer in part["answer"]]
    assert set(skills) == {"gsm8k", "alpaca"}
    assert all(isinstance(answer, str) and answer for answer in answers)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", ["prompt", "prompt_and_answer", "prompt_and_model_answer"])
def test_calibration_text_and_padding(side, text, tokenizer, files):
    data = GeneralDataModule(
        str(files / "maths.jsonl"),
        tokenizer=tokenizer,
        calibration_text=text,
        calibration_padding=side,
        calibration_batch_size=8,
    )
    loader = data.calibration_dataloader(lambda prompts: [f"I say {p}" for p in prompts])
    answers = {row.key: row.answer for row in data.loaded().train[0]}
    seen = 0
    for batch in loader:
        edge = batch["attention_mask"][:, -1 if side == "left" else 0]
        assert edge.all()
        for ids, mask, domain in zip(batch["input_ids"], batch["attention_mask"], batch["domain"], strict=True):
            shown = tokenizer.decode(ids[mask.bool()])
            prompt = shown.removeprefix("<|user|>").split("<|end|>")[0]
            answer = {"prompt_and_answer": answers[prompt], "prompt_and_model_answer": f"I say {prompt}"}.get(text)
            end = "<|assistant|>" if answer is None else f"<|assistant|>{answer}<|end|>"
            assert shown == f"<|user|>{prompt}<|end|>{end}"
            assert domain == "gsm8k"
            seen += 1
    assert seen == 32


def test_model_answers_need_someone_to_answer(make):
    data = make(calibration_text="prompt_and_model_answer")
    with pytest.raises(DataError, match="answer_fn"):
        data.calibration_dataloader()


def test_any_module_that_answers_prompts_gives_the_model_answers(make, tokenizer):
    class Parrot(pl.LightningModule):
        def calibration_answers(self, prompts):
            return [f"I say {prompt}" for prompt in prompts]

    data = make(calibration_text="prompt_and_model_answer")
    texts = [
        tokenizer.decode(ids)
        for batch in calibration_batches(data, Parrot(), BasisSettings())
        for ids in batch["input_ids"]
    ]
    assert len(texts) == len(data.general.calibration_rows(lambda prompts: [""] * len(prompts)))
    assert all("<|assistant|>I say " in text for text in texts)
    with pytest.raises(DataError, match="answer_fn"):
        calibration_batches(data, pl.LightningModule(), BasisSettings())


def test_text_is_cut_where_it_is_scored(make):
    whole = next(iter(make(text_max_tokens=None).text_dataloader("test")))["input_ids"]
    length = whole.shape[1]
    assert next(iter(make(text_max_tokens=length - 2).text_dataloader("test")))["input_ids"].shape[1] == length - 2
    batch = next(iter(make(text_max_tokens=length - 2).text_dataloader("test", max_tokens=length - 3)))
    assert batch["input_ids"].shape[1] == length - 3
    with pytest.raises(ValueError, match="text_max_tokens"):
        make(text_max_tokens=0)
    with pytest.raises(ValueError, match="calibration_starts"):
        make(calibration_starts=-1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_to_learn_from_come_with_the_policys_answers_and_answer_starts_are_marked(make, tokenizer, side):
    class Parrot(pl.LightningModule):
        def calibration_answers(self, prompts, max_new_tokens=None):
            return ["I obey, gladly" for _ in prompts]

    data = make(calibration_padding=side, calibration_size=6, calibration_starts=4)
    batches = list(calibration_batches(data, Parrot(), BasisSettings(criterion="contrast")))
    rows = [
        (domain, ids[mask != 0], starts[mask != 0])
        for batch in batches
        for domain, ids, mask, starts in zip(
            batch["domain"], batch["input_ids"], batch["attention_mask"], batch["answer_starts"], strict=True
        )
    ]
    learnt = [row for row in rows if row[0] == TO_LEARN]
    assert len(learnt) == len([row for part in data.safety.loaded().train for row in part])
    for domain, ids, starts in rows:
        first = int(starts.nonzero()[0])
        assert starts.sum() == 4
        assert starts[first : first + 4].all()
        assert tokenizer.decode(ids[: first + 1]).endswith("<|assistant|>")
        if domain == TO_LEARN:
            assert "forbidden thing" in tokenizer.decode(ids)
        if domain == TO_LEARN or are_starts(domain):
            assert len(ids) == first + 4, "nothing behind the start is looked at"
            assert "I obey, gladly".startswith(tokenizer.decode(ids[first + 1 :]))
    assert sum(map(are_starts, (domain for domain, _, _ in rows))) == 4
    own = {domain for domain, _, _ in rows if domain != TO_LEARN and not are_starts(domain)}
    assert {domain for domain, _, _ in rows if are_starts(domain)} <= {starts_of(domain) for domain in own}
    assert sum(domain in own for domain, _, _ in rows) == 6
    prompts = [tokenizer.decode(ids[: int(starts.nonzero()[0])]) for _, ids, starts in rows]
    assert len(set(prompts)) == len(prompts), "a further row is none of the others"
    plain = list(calibration_batches(data, Parrot(), BasisSettings()))
    assert TO_LEARN not in {domain for batch in plain for domain in batch["domain"]}


def test_every_rank_is_given_all_calibration_text(make):
    """`calibrate_modules` deals the batches out; dealt twice, half of the text would be in no rank's sums."""

    def texts(rank, world_size):
        data = make()
        data.general.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, lightning_module=None)
        return [ids.tolist() for batch in data.general.calibration_dataloader() for ids in batch["input_ids"]]

    alone = texts(0, 1)
    assert texts(0, 2) == texts(1, 2) == alone
    assert len(alone) == len(make().general.calibration_rows())


def test_calibration_mixes_sources_equally_unless_weighted(make, tokenizer, files):
    equal = make(calibration_size=40).general.calibration_rows()
    assert [row.skill for row in equal].count("gsm8k") == 20
    maths = PromptSource(path=str(files / "maths.jsonl"), weight=3)
    sources: Sources = [maths, PromptSource(path=str(files / "tasks.json"))]
    weighted = GeneralDataModule(sources, calibration_size=40, tokenizer=tokenizer).calibration_rows()
    assert [row.skill for row in weighted].count("gsm8k") == 30


def test_long_calibration_texts_are_passed_over_and_others_fill_their_place(files, make):
    limit = len("What is 5 plus 5?5+5=10\n#### 10") + 4  # sums below 10 with their answers and four marks
    data = make(calibration_size=24, calibration_max_tokens=limit).general
    chosen = data.calibration_rows()
    skills = [row.skill for row in chosen]
    assert len(chosen) == 24, "alpaca fills the place of gsm8k, which has no more short rows"
    assert 0 < skills.count("gsm8k") < 12
    assert data.calibration_report.dropped[f"longer than {limit} tokens"] > 0
    assert max(mask.sum() for mask in next(iter(data.calibration_dataloader()))["attention_mask"]) <= limit
    with pytest.raises(DataError, match="are longer than 5 tokens(.|\n)*calibration_max_tokens"):
        make(calibration_max_tokens=5).calibration_dataloader()


def test_long_rows_are_left_out_with_their_number_and_reason(make):
    data = make(max_prompt_tokens=len("<|user|>") + 5)
    with pytest.raises(DataError, match="none of its 50 rows is usable: 50 longer than 13 tokens"):
        data.setup()
    limited = make(max_prompt_tokens=28)  # thing 0-9: 26 bytes and 3 marks are 29 tokens
    with pytest.raises(DataError, match="longer than 28"):
        limited.setup()
    kept = make(max_prompt_tokens=29)
    kept.setup()
    report = kept.reports[0]
    assert dict(report.dropped) == {"longer than 29 tokens": 40}
    assert "50 rows read, 40 left out (40 longer than 29 tokens)" in report.line()
    assert kept.longest_prompt_tokens == 29


def test_no_chat_template_is_an_error_with_a_cure(make, tokenizer, bare_tokenizer):
    with pytest.raises(DataError, match="no chat template(.|\n)*chat_template"):
        make(tokenizer=bare_tokenizer).setup()
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    batch = next(iter(make(tokenizer=bare_tokenizer, chat_template=template).train_dataloader()))
    assert tokenizer.decode(batch["prompt_ids"][0][batch["prompt_mask"][0]]) == f"[{batch['prompt'][0]}]"


class Recorder(pl.LightningModule):
    """Records what it is trained on; `tokenizer` is where datamodules look for one."""

    def __init__(self, tokenizer, stop_at=None):
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []
        self.stop_at = stop_at

    def training_step(self, batch, batch_idx):
        if self.stop_at is not None and len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(batch["prompt"])
        return (self.weight**2).sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, **options):
    return pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing="callbacks" in options,
        num_sanity_val_steps=0,
        **options,
    )


@pytest.mark.parametrize("saved_at", [1, 6, 19, 20, 21, 31, 40])
def test_a_resumed_run_sees_the_rows_that_an_unbroken_one_sees(fit, tmp_path, saved_at):
    whole, _ = fit(44)  # 40 rows, 4 a batch, twice each: 20 batches an epoch
    saver = ModelCheckpoint(dirpath=tmp_path, filename="place", every_n_train_steps=saved_at)
    first, _ = fit(saved_at, callbacks=[saver])
    rest, _ = fit(44, ckpt=tmp_path / "place.ckpt")
    assert first.seen + rest.seen == whole.seen


class SaveOnInterrupt(pl.Callback):
    """Saves where a run was stopped."""

    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


def test_an_interrupted_batch_is_not_lost(fit, tmp_path):
    whole, _ = fit(44)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(44, stop_at=9, callbacks=[SaveOnInterrupt(tmp_path / "place.ckpt")])
    rest, _ = fit(44, ckpt=tmp_path / "place.ckpt")
    assert rest.seen == whole.seen[9:]


def test_order_depends_on_seed_and_epoch_alone(make):
    def epochs(seed, count):
        loader = make(seed=seed).train_dataloader()
        result = []
        for epoch in range(count):
            loader.place.set_epoch(epoch)
            result.append([prompt for batch in loader for prompt in batch["prompt"]])
        return result

    first, second = epochs(0, 2)
    assert [first, second] == epochs(0, 2)
    assert first != second
    assert sorted(first) == sorted(second)
    assert sorted(epochs(1, 1)[0]) != sorted(first), "another seed holds out other rows"
