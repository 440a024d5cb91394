"""Reward models, cost models and text classifiers through transformers, as rewards and as judges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nspo_lightning.evaluation.thoughts import is_unfinished
from nspo_lightning.policy.gguf import find_gguf
from nspo_lightning.rewards.judges.local_model import (
    DType,
    context_limit,
    load_judge_config,
    load_judge_model,
    load_judge_tokenizer,
    padded,
    padded_batches,
    resolve_device,
)
from nspo_lightning.rewards.judges.score_head import is_score_checkpoint, load_score_model
from nspo_lightning.rewards.judges.structure import Chat, Marks, control_tokens, harmless
from nspo_lightning.rewards.judges.verdicts import Verdict, outcomes_of
from nspo_lightning.rewards.messages import answer_text, as_chat, as_text, transcript
from nspo_lightning.rewards.protocol import Judge, Outcome, Reward, RewardError, Scores, Text

_BEAVER = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{completion}{eos}"
"""The conversation format that PKU's beaver models were trained on."""


class ClassifierReward(Reward):
    """The score that a sequence-classification model gives to prompt and completion.

    Any checkpoint that `AutoModelForSequenceClassification` loads, and reward or cost models with a score head of
    their own (PKU's beaver models) without remote code. The model is loaded at the first use (or by `prepare`).

    Args:
        model: Hub id or folder.
        template: How prompt and completion become one text: `{prompt}` and `{completion}` (and `{eos}`) in a string.
            By default the tokenizer's chat template, the beaver format for beaver models, else the tokenizer's pair of
            two texts.
        label: Which class counts, by name or number; needed when there is more than one.
        output: `logit`, or `probability` (softmax over the classes; sigmoid of a single or a multi-label one).
        scale: Factor of the score; -1 for a cost model, where higher means more harmful.
        shift: Added to the score after `scale`.
        device: Where it runs; the policy's device by default.
        dtype: Its number format; the checkpoint's by default.
        load_in_4bit: Load it in NF4; the head stays as it is.
        batch_size: Samples in one forward pass.
        max_tokens: Longest text; the model's own limit by default.
        too_long: What a longer text does: `error`, or `truncate` (the end of the completion is cut, and counted).
        name: What TensorBoard and messages call it.
    """

    def __init__(
        self,
        model: str,
        template: str | None = None,
        label: str | int | None = None,
        output: Literal["logit", "probability"] = "logit",
        scale: float = 1.0,
        shift: float = 0.0,
        device: str | None = None,
        dtype: DType = "auto",
        load_in_4bit: bool = False,
        batch_size: int = 16,
        max_tokens: int | None = None,
        too_long: Literal["error", "truncate"] = "error",
        name: str = "classifier",
    ) -> None:
        if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"`batch_size` and `max_tokens` must be at least 1, got {batch_size} and {max_tokens}.")
        if output not in ("logit", "probability") or too_long not in ("error", "truncate"):
            raise ValueError(
                f"`output` must be logit or probability and `too_long` error or truncate, got {output!r} and "
                f"{too_long!r}."
            )
        if template is not None and not ("{prompt}" in template and "{completion}" in template):
            raise ValueError("`template` must hold `{prompt}` and `{completion}`.")
        self.model_id, self.template, self.label, self.output = model, template, label, output
        self.scale, self.shift, self.device, self.dtype = scale, shift, device, dtype
        self.load_in_4bit, self.batch_size, self.max_tokens = load_in_4bit, batch_size, max_tokens
        self.too_long, self.name = too_long, name
        self.truncated = self.neutralised = 0
        self._marks: Marks | None = None
        self._controls: frozenset[int] = frozenset()
        self._model: Any = None
        self._tokenizer: Any = None
        self._pad_token_id = 0
        self._column = 0
        self._multi_label = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_tokenizer": None}

    def prepare(self) -> None:
        """Load the model now, so that a wrong path ends a run before it starts."""
        if self._model is not None:
            return
        from transformers import AutoModelForSequenceClassification

        if find_gguf(self.model_id) is not None:
            raise ValueError(
                f"'{self.model_id}' is a GGUF file: it holds a language model without a classifier's head, so its "
                "scores would be noise. Give the classifier's original folder or hub id as `model`."
            )
        tokenizer = load_judge_tokenizer(self.model_id)
        config = load_judge_config(self.model_id)
        device = resolve_device(self.device)
        if is_score_checkpoint(config):
            self.template = self.template or (None if tokenizer.chat_template else _BEAVER)
            model: Any = load_score_model(self.model_id, config, device, self.dtype, self.load_in_4bit)
            count = model.head.out_features
        else:
            loader = AutoModelForSequenceClassification
            model = load_judge_model(self.model_id, loader, device, self.dtype, self.load_in_4bit)
            model.config.pad_token_id = self._pad_token_id = _pad_token_id(tokenizer)
            count = model.config.num_labels
        self._multi_label = count == 1 or config.problem_type == "multi_label_classification"
        self._column = self._chosen(count, config.label2id or {})
        limits = [limit for limit in (self.max_tokens, context_limit(config)) if limit]
        self.max_tokens = min(limits) if limits else None
        self._model, self._tokenizer = model, tokenizer

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> Scores:
        """Give `scale * score + shift` for each completion's answer; None for a thought that does not end."""
        self.prepare()
        texts = enumerate(zip(prompts, completions, strict=True))
        rows = [self._encode(i, prompt, completion) for i, (prompt, completion) in texts]
        scores: list[float | None] = [0.0] * len(rows)
        device = next(self._model.parameters()).device
        ids = [row["input_ids"] for row in rows]
        for group, inputs in padded_batches(ids, self.batch_size, self._pad_token_id, device, "right"):
            if "token_type_ids" in rows[0]:
                inputs["token_type_ids"] = padded([rows[i]["token_type_ids"] for i in group], 0, "right").to(device)
            for i, score in zip(group, self._scores(inputs), strict=True):
                scores[i] = None if is_unfinished(as_text(completions[i])) else self.scale * score + self.shift
        return scores

    def metrics(self) -> dict[str, float]:
        """Return how many texts were `truncated`, and in how many control tokens were broken (`neutralised`)."""
        return {"truncated": float(self.truncated), "neutralised": float(self.neutralised)}

    @torch.inference_mode()
    def _scores(self, inputs: dict[str, Tensor]) -> list[float]:
        found = self._model(**inputs)
        logits: Tensor = (found if isinstance(found, Tensor) else found.logits).float()
        if self.output == "probability":
            logits = logits.sigmoid() if self._multi_label else logits.softmax(-1)
        return list(logits[:, self._column].tolist())

    def _encode(self, index: int, prompt: Text, completion: Text) -> dict[str, list[int]]:
        answer = answer_text(completion)
        encoded = self._tokens(prompt, answer)
        limit = self.max_tokens or len(encoded["input_ids"])
        over = len(encoded["input_ids"]) - limit
        if over <= 0:
            return encoded
        if self.too_long == "error":
            raise RewardError(
                f"Reward '{self.name}' would have to read {limit + over} tokens for sample {index}, but its limit is "
                f"{limit}. Shorten completions, or set `too_long: truncate`.",
                self.name,
            )
        self.truncated += 1
        ids = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
        while over > 0 and ids:  # cutting the text and encoding again keeps the template's end in place
            ids = ids[: max(0, len(ids) - over)]
            encoded = self._tokens(prompt, self._tokenizer.decode(ids, skip_special_tokens=True))
            over = len(encoded["input_ids"]) - limit
        if over > 0:
            raise RewardError(
                f"Reward '{self.name}' can't read sample {index}: its prompt alone is longer than the limit of {limit} "
                f"tokens. Shorten prompts.",
                self.name,
            )
        return encoded

    def _tokens(self, prompt: Text, completion: str) -> dict[str, list[int]]:
        """Encode prompt and completion, with the marks in them broken; RewardError if control tokens are left."""
        if self._marks is None:
            tokens = control_tokens(self._tokenizer)
            self._marks, self._controls = Marks(tokens, (), [self.template or ""]), frozenset(tokens.values())
        turns = as_chat(prompt, completion)
        plain = [{**turn, "content": self._marks.broken(turn["content"])} for turn in turns]
        self.neutralised += plain != turns
        encoded, expected = self._plain_tokens(prompt, plain), self._plain_tokens(prompt, harmless(turns))
        if self._controls_in(encoded) != self._controls_in(expected):
            raise RewardError(
                f"Reward '{self.name}' would read control tokens that a completion or prompt holds. Leave that prompt "
                "out, or give another `template`.",
                self.name,
            )
        return encoded

    def _controls_in(self, encoded: dict[str, list[int]]) -> list[int]:
        return [number for number in encoded["input_ids"] if number in self._controls]

    def _plain_tokens(self, prompt: Text, chat: Chat) -> dict[str, list[int]]:
        asked: Text = chat[0]["content"] if isinstance(prompt, str) else chat[:-1]
        completion = str(chat[-1]["content"])
        if self.template is not None:
            eos = self._tokenizer.eos_token or ""
            parts = self.template.replace("{eos}", eos).split("{completion}", 1)
            text = parts[0].replace("{prompt}", transcript(asked)) + completion + parts[1]
            return dict(self._tokenizer(text))
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(chat, tokenize=False)
            return dict(self._tokenizer(text, add_special_tokens=False))
        return dict(self._tokenizer(transcript(asked), completion))

    def _chosen(self, count: int, names: dict[str, int]) -> int:
        if self.label is None and count == 1:
            return 0
        if self.label is None:
            raise ValueError(
                f"`label` must say which of the {count} classes of '{self.model_id}' counts: {', '.join(names)}."
            )
        column = names.get(str(self.label), self.label)
        if not isinstance(column, int) or not 0 <= column < count:
            raise ValueError(
                f"`label` must be one of {', '.join(names)} or a number below {count}, got {self.label!r}."
            )
        return column


class ClassifierJudge(Judge):
    """Names outcomes by a classifier's score: unsafe at or above a bound.

    Args:
        classifier: What scores; for a cost model leave its `scale` positive.
        unsafe_from: Lowest score that counts as unsafe. A cost model's sign says it: 0.
    """

    def __init__(self, classifier: ClassifierReward, unsafe_from: float = 0.0) -> None:
        self.classifier, self.unsafe_from = classifier, unsafe_from

    def prepare(self) -> None:
        """Load the classifier now."""
        self.classifier.prepare()

    def metrics(self) -> dict[str, float]:
        """Return the classifier's counters."""
        return self.classifier.metrics()

    def classify(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[Outcome | None]:
        """Judge one batch: garbage and refusals by rules, the rest by the score."""
        scores = self.classifier(prompts, completions)
        verdicts = [Verdict(unsafe=float(score is not None and score >= self.unsafe_from)) for score in scores]
        return outcomes_of(verdicts, completions)


def _pad_token_id(tokenizer: Any) -> int:
    """Choose what fills up rows: not the end token, which a decoder would then take for padding at a text's end."""
    eos = tokenizer.eos_token_id
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, int(eos == 0))
    return next(int(token) for token in candidates if token is not None and token != eos)
