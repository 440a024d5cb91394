"""GGUF files as policies: the same model, checked, converted once, and refused where it would be another one."""

from __future__ import annotations

import json
import shutil
import threading
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")

import tiny_gguf
import transformers

from nspo_lightning.policy.gguf import GGUFError, cache, file, model_folder
from nspo_lightning.policy.gguf.convert import RECORD, convert, llama3_scaling
from nspo_lightning.policy.gguf.english import PAGE
from nspo_lightning.policy.loading import load_base
from nspo_lightning.policy.settings import PolicyError, PolicySettings
from nspo_lightning.policy.tokenizer import load_tokenizer
from nspo_lightning.rewards.judges.classifier import ClassifierReward
from nspo_lightning.rewards.judges.local_model import load_judge_config, load_judge_model, load_judge_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def learnt():
    return tiny_gguf.learnt_page()


@pytest.fixture(scope="module")
def written(learnt, tmp_path_factory):
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", *learnt)


@pytest.fixture(autouse=True)
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("NSPO_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def logits(model, tokenizer):
    with torch.no_grad():
        return model(tokenizer(PAGE[:200], return_tensors="pt")["input_ids"]).logits


def test_a_file_is_the_model_that_it_was_made_from(learnt, written, cached):
    model, tokenizer = learnt
    settings = PolicySettings(path=str(written), quantization="none", dtype="float32")
    found, text = load_base(settings, CPU), load_tokenizer(settings)
    assert text(PAGE)["input_ids"] == tokenizer(PAGE)["input_ids"]
    assert text.chat_template == tiny_gguf.TEMPLATE
    torch.testing.assert_close(logits(found, text), logits(model, tokenizer))
    record = json.loads(next(cached.glob(f"*/{RECORD}")).read_text())
    assert record["sha256"] == file.content_hash(written)
    assert record["nll_per_token"] < record["nll_limit"]


def test_a_quantised_file_is_a_base_in_4_bit_as_any_other(learnt, tmp_path):
    path = tiny_gguf.write(tmp_path / "blob-without-an-ending", *learnt, kind="Q8_0")  # as Ollama keeps them
    settings = PolicySettings(path=str(path), quantization="nf4", dtype="float32")
    found = load_base(settings, CPU)
    assert any(type(module).__name__ == "Linear4bit" for module in found.modules())
    assert (logits(found, load_tokenizer(settings)) - logits(*learnt)).std() < 0.5 * logits(*learnt).std()


def test_a_file_is_converted_once_whatever_its_name(written, tmp_path, cached):
    other = tmp_path / "models" / "renamed.gguf"
    other.parent.mkdir()
    shutil.copy(written, other)
    first = model_folder(str(written))
    times = [p.stat().st_mtime_ns for p in sorted(cached.glob("*/*"))]
    assert model_folder(str(other.parent)) == model_folder(str(other.parent), "renamed.gguf") == first
    assert [p.stat().st_mtime_ns for p in sorted(cached.glob("*/*"))] == times


def test_rows_in_another_order_are_seen_and_nothing_is_kept(learnt, tmp_path, cached):
    path = tiny_gguf.write(tmp_path / "wrong.gguf", *learnt, permute=False)
    with pytest.raises(GGUFError, match=r"NLL of \d\.\d\d nats a token; at most 3.5 was expected"):
        model_folder(str(path))
    assert [p.suffix for p in cached.iterdir()] == [".lock"]


def test_a_half_written_cache_is_never_used_and_two_convert_once(written, cached, monkeypatch):
    target = cached / f"{file.content_hash(written)[:32]}-v1"
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")  # without a record: not whole
    (cached / f".{target.name}.1.partial").mkdir()  # of a process that was killed
    made = []

    def counted(*given):
        made.append(1)
        return convert(*given)

    monkeypatch.setattr(cache, "convert", counted)
    threads = [threading.Thread(target=model_folder, args=(str(written),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert (target / RECORD).is_file()
    assert not list(cached.glob(".*"))


def test_what_fails_on_the_way_leaves_nothing(written, cached, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nspo_lightning.policy.gguf.convert._write", full)
    with pytest.raises(OSError, match="No space"):
        model_folder(str(written))
    assert [p.suffix for p in cached.iterdir()] == [".lock"]


def test_a_judge_is_read_from_a_file_and_a_classifier_is_not(written):
    name = str(written)
    assert load_judge_config(name).architectures == ["LlamaForCausalLM"]
    model = load_judge_model(name, transformers.AutoModelForCausalLM, CPU, "float32", load_in_4bit=False)
    assert logits(model, load_judge_tokenizer(name)).isfinite().all()
    with pytest.raises(ValueError, match="without a classifier's head"):
        ClassifierReward(name).prepare()


def test_a_file_without_a_chat_template_says_so(learnt, tmp_path):
    path = tiny_gguf.write(tmp_path / "plain.gguf", *learnt, template=None)
    with pytest.raises(PolicyError, match=r"plain.gguf' has no chat template.*`policy.chat_template`"):
        load_tokenizer(PolicySettings(path=str(path)))


BAD = {
    "cut in the weights": (lambda p: p.write_bytes(p.read_bytes()[:-5000]), "cut off or damaged.*Download it again"),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:900]), "cut off or damaged"),
    "text": (lambda p: p.write_text("not found"), "no GGUF one"),
    "not there": (lambda p: p.unlink(), "found nothing there"),
    "a page of a web server": (lambda p: p.write_bytes(b"<html>"), "download the file again"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_one_message(name, written, tmp_path, cached):
    spoil, says = BAD[name]
    shutil.copy(written, tmp_path / "bad.gguf")
    spoil(tmp_path / "bad.gguf")
    with pytest.raises(GGUFError, match=says):
        model_folder(str(tmp_path / "bad.gguf"))
    assert not list(cached.glob("*/*"))


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": (
        {"architecture": "deepseek9"},
        "'deepseek9', which transformers doesn't read.*llama",
    ),
    "adapter": ({"fields": [("general.type", "adapter")]}, "a LoRA adapter, not a whole model"),
    "vision part": ({"architecture": "clip"}, "mmproj"),
    "one part": ({"fields": [("split.count", 3)]}, "one of 3 parts.*gguf-split --merge"),
    "scaled positions": ({"fields": [("llama.rope.scaling.type", "yarn")]}, "scales its positions.*yarn"),
    "a weight that is not used": ({"blk__0__attn_q__bias": torch.ones(64)}, "does not hold the same weights"),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_no_whole_known_model_is_refused(name, learnt, tmp_path, cached):
    given, says = OTHER[name]
    with pytest.raises(GGUFError, match=says):
        model_folder(str(tiny_gguf.write(tmp_path / "other.gguf", *learnt, **given)))
    assert not list(cached.glob("*/*"))


def test_a_folder_of_several_files_lists_them(written, tmp_path):
    for name in ("a.Q4_K_M.gguf", "b.Q8_0.gguf", "mmproj-model.gguf"):
        shutil.copy(written, tmp_path / name)
    with pytest.raises(GGUFError, match=r"2 GGUF files: a.Q4_K_M.gguf, b.Q8_0.gguf.*`policy.gguf_file`"):
        file.find_gguf(str(tmp_path))
    with pytest.raises(GGUFError, match=r"expected 'c.gguf'.*a.Q4_K_M.gguf"):
        file.find_gguf(str(tmp_path), "c.gguf")
    with pytest.raises(GGUFError, match="Leave one of them out"):
        file.find_gguf(str(tmp_path / "a.Q4_K_M.gguf"), "b.Q8_0.gguf")
    assert file.find_gguf(str(tmp_path), "b.Q8_0.gguf") == tmp_path / "b.Q8_0.gguf"


def test_a_folder_with_weights_of_its_own_is_no_gguf(tiny_llama, written, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "both")
    shutil.copy(written, tmp_path / "both")
    assert model_folder(str(tmp_path / "both")) == str(tmp_path / "both")


def test_without_the_package_it_says_what_to_install(written, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GGUFError, match=r'pip install "nspo-lightning\[gguf\]"'):
        model_folder(str(written))


def test_llama3_scaling_is_read_off_the_factors():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    asked = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    asked["original_max_position_embeddings"] = 8192
    config = transformers.LlamaConfig(
        head_dim=64, max_position_embeddings=131072, rope_parameters={"rope_theta": 500000.0, **asked}
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    plain = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    assert llama3_scaling((plain / scaled).tolist(), 500000.0) == asked
    assert llama3_scaling([1.0] * 31 + [2.5], 500000.0) is None


def test_llama3_factors_in_a_file_reach_the_model(learnt, tmp_path):
    model, tokenizer = learnt
    theta = model.config.rope_parameters["rope_theta"]
    base = theta ** (-torch.arange(0, 32, 2) / 32)
    config = transformers.LlamaConfig(**{
        **model.config.to_dict(),
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    })
    scaled = transformers.LlamaForCausalLM(config)
    scaled.load_state_dict(model.state_dict())
    factors = base / scaled.model.rotary_emb.inv_freq
    assert factors.max() > 1
    path = tiny_gguf.write(tmp_path / "llama3.gguf", model, tokenizer, rope_freqs__weight=factors.float())
    found = load_base(PolicySettings(path=str(path), quantization="none", dtype="float32"), CPU)
    torch.testing.assert_close(logits(found, tokenizer), logits(scaled.eval(), tokenizer), rtol=1e-4, atol=1e-4)
