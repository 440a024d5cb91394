"""Reward and cost models: transformers' heads and beaver's, checked against a forward pass written out here."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file
from tiny_guards import CONVERSATIONS, make_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)

from nspo_lightning.rewards import ClassifierJudge, ClassifierReward, RewardError, RewardSet

ORDER_TOLERANCE = 1e-4  # float32 sums in another order when a row is padded
PROMPTS, COMPLETIONS = zip(*[*CONVERSATIONS[:5], ("tell me " * 8, "the window " * 9)], strict=True)
BEAVER = "BEGINNING OF CONVERSATION: USER: {} ASSISTANT:{}"


def small_llama(tokenizer, **extra):
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **extra,
    )


def tokenizer_without_template():
    tokenizer = make_tokenizer("harmbench")
    tokenizer.chat_template = None
    return tokenizer


def save_beaver(folder, shape="safetensors", head="score_head", **config_extra):
    """A checkpoint shaped like `LlamaModelForScore`: the backbone under `model.`, the head beside it."""
    torch.manual_seed(0)
    tokenizer = tokenizer_without_template()
    config = small_llama(tokenizer, architectures=["LlamaModelForScore"], score_dim=1, **config_extra)
    backbone = LlamaModel(config)
    state = {f"model.{name}": tensor.clone() for name, tensor in backbone.state_dict().items()}
    state[f"{head}.weight"], state[f"{head}.bias"] = torch.randn(1, 64), torch.tensor([0.25])
    state["normalizer.mean"], state["normalizer.var"] = torch.tensor([0.5]), torch.tensor([4.0])
    config.architectures = ["LlamaModelForScore"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if shape == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    elif shape == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        import json

        names = sorted(state)
        parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
        for file, kept in parts.items():
            save_file({name: state[name] for name in kept}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, kept in parts.items() for name in kept}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tokenizer, backbone.eval(), state[f"{head}.weight"], state[f"{head}.bias"]


def by_hand(tokenizer, backbone, weight, bias):
    scores = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        text = BEAVER.format(prompt, completion) + tokenizer.eos_token
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            scores.append((backbone(input_ids=ids)[0][0, -1] @ weight[0] + bias[0]).item())
    return scores


@pytest.mark.parametrize("shape", ["safetensors", "bin", "sharded"])
def test_beaver_checkpoint_loads_without_its_code(tmp_path, shape):
    made = save_beaver(tmp_path, shape)
    reward = ClassifierReward(str(tmp_path), device="cpu", batch_size=4)
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(by_hand(*made), abs=ORDER_TOLERANCE)


def test_scale_shift_and_normalizer(tmp_path):
    made = save_beaver(tmp_path, do_normalize=True)
    cost = ClassifierReward(str(tmp_path), device="cpu", scale=-1.0, shift=2.0)
    expected = [2.0 - (score - 0.5) / 2.0 for score in by_hand(*made)]  # mean 0.5, std sqrt(4)
    assert cost(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=ORDER_TOLERANCE)


def test_other_names_of_heads(tmp_path):
    made = save_beaver(tmp_path, head="v_head.summary")
    reward = ClassifierReward(str(tmp_path), device="cpu")
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(by_hand(*made), abs=ORDER_TOLERANCE)


def test_checkpoint_without_a_head(tmp_path):
    save_beaver(tmp_path, head="something_else")
    with pytest.raises(ValueError, match="has no score head: none of its tensors is named score_head"):
        ClassifierReward(str(tmp_path), device="cpu").prepare()


@pytest.mark.parametrize("pad", ["own", "eos"])
def test_llama_sequence_classification(tmp_path, pad):
    torch.manual_seed(0)
    tokenizer = tokenizer_without_template()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}</s>"
    if pad == "eos":
        tokenizer.pad_token = tokenizer.eos_token  # as many reward models have it; the text ends with it too
    model = LlamaForSequenceClassification(small_llama(tokenizer, num_labels=1)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scores = ClassifierReward(str(tmp_path), device="cpu", batch_size=4)(PROMPTS, COMPLETIONS)
    for prompt, completion, score in zip(PROMPTS, COMPLETIONS, scores, strict=True):
        ids = torch.tensor([tokenizer(f"user: {prompt}\nassistant: {completion}\n</s>")["input_ids"]])
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.inference_mode():
            assert score == pytest.approx(
                (model.model(ids)[0][0, -1] @ model.score.weight[0]).item(), abs=ORDER_TOLERANCE
            )


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """(folder, tokenizer, model): an encoder with three classes, reading a pair of texts."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    tokenizer = tokenizer_without_template()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=96, id2label={0: "fine", 1: "rude", 2: "toxic"},
        label2id={"fine": 0, "rude": 1, "toxic": 2}, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), tokenizer, model


@pytest.mark.parametrize(("label", "column"), [("toxic", 2), (1, 1), ("fine", 0)])
def test_encoder_with_several_classes(bert, label, column):
    folder, tokenizer, model = bert
    reward = ClassifierReward(folder, label=label, output="probability", device="cpu", batch_size=3)
    scores = reward(PROMPTS, COMPLETIONS)
    for prompt, completion, score in zip(PROMPTS, COMPLETIONS, scores, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([tokenizer(prompt, completion)["input_ids"]])).logits[0]
        assert score == pytest.approx(logits.softmax(0)[column].item(), abs=ORDER_TOLERANCE)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "`label` must say which of the 3 classes.*fine, rude, toxic"),
        ("bad", "`label` must be one of fine"),
        (7, "below 3"),
    ],
)
def test_class_must_be_named(bert, label, message):
    with pytest.raises(ValueError, match=message):
        ClassifierReward(bert[0], label=label, device="cpu").prepare()


def test_too_long_a_text_is_an_error_or_a_counted_cut(bert):
    folder = bert[0]
    long = "the window " * 200
    with pytest.raises(
        RewardError, match=r"would have to read \d+ tokens for sample 1, but its limit is 96.*`too_long"
    ):
        ClassifierReward(folder, label=0, device="cpu")(["q", "q"], ["a", long])
    reward = ClassifierReward(folder, label=0, device="cpu", too_long="truncate", name="r")
    result = RewardSet([reward])(["q", "q"], ["a", long])
    assert result.metrics == {"judge/r/truncated": 1.0, "judge/r/neutralised": 0.0}
    with pytest.raises(RewardError, match="prompt alone is longer than the limit of 96"):
        reward([long], ["a"])


def test_judge_by_a_cost_model(tmp_path):
    made = save_beaver(tmp_path)
    judge = ClassifierJudge(ClassifierReward(str(tmp_path), device="cpu"), unsafe_from=0.0)
    expected = ["unsafe" if score >= 0.0 else "safe" for score in by_hand(*made)]
    assert judge.classify(PROMPTS, COMPLETIONS) == expected
    assert judge.classify(["q"], [""]) == ["garbage"]


def test_four_bits_keep_the_head(tmp_path):
    made = save_beaver(tmp_path)
    reward = ClassifierReward(str(tmp_path), device="cpu", load_in_4bit=True, dtype="float32")
    scores = reward(PROMPTS, COMPLETIONS)
    kinds = {type(module).__name__ for module in reward._model.backbone.modules()}
    assert "Linear4bit" in kinds
    assert reward._model.head.weight.dtype == torch.float32
    # NF4 moves these scores (-0.7 to 2.2) by up to 0.44; constant scores, or those of other rows, are further off.
    assert scores == pytest.approx(by_hand(*made), abs=0.6)


def test_pickles_without_the_model(tmp_path):
    save_beaver(tmp_path)
    reward = ClassifierReward(str(tmp_path), device="cpu")
    first = reward(PROMPTS, COMPLETIONS)
    copy = pickle.loads(pickle.dumps(reward))
    assert copy._model is None
    assert copy(PROMPTS, COMPLETIONS) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size`"),
        ({"output": "loss"}, "`output` must be logit or probability"),
        ({"template": "{completion}"}, "`template` must hold"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassifierReward("m", **arguments)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="tokenizer could not be loaded"):
        ClassifierReward(str(tmp_path / "none")).prepare()
