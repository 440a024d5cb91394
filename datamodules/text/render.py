"""Prompts as the policy reads them: the tokenizer's chat template applied, then token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from nspo_lightning.datamodules.sources.data_error import DataError, clip
from nspo_lightning.datamodules.sources.rows import Prompt, PromptRow
from nspo_lightning.policy.chat_template import read_chat_template
from nspo_lightning.policy.chats import as_turns, folds_system, with_system
from nspo_lightning.policy.turns import (
    SpecialTokens,
    answer_place,
    common_start,
    end_of_turn,
    special_ids,
)


class Tokenizer(SpecialTokens, Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    chat_template: Any
    pad_token_id: int | None
    eos_token_id: int | None

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Render a chat."""

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        """Encode text."""


class ChatRenderer:
    """Renders prompts with one tokenizer and one chat template.

    Args:
        tokenizer: A Hugging Face tokenizer, or anything with `apply_chat_template` and a call that encodes.
        chat_template: A Jinja template, or the path of a file that holds one; the tokenizer's own when None.
        check: Looks at all ids, on the CPU, and raises an error of its own; None = nothing is looked at.

    Raises:
        DataError: If there is no template at all.
        PolicyError: If a template is given that is none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str | None = None,
        check: Callable[[Sequence[Sequence[int]]], None] | None = None,
    ) -> None:
        self.tokenizer, self._check = tokenizer, check
        self.template = None if chat_template is None else read_chat_template(chat_template)
        if self.template is None and not tokenizer.chat_template:
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise DataError(
                f"tokenizer {name!r}",
                "it has no chat template, and none was given",
                "Set `policy.chat_template` to a Jinja template or the path of one, or use an instruction-tuned model.",
            )

    @property
    def pad_token_id(self) -> int:
        """The id that fills short rows; masks say where it stands."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(candidate) for candidate in known if candidate is not None), 0)

    def text(self, prompt: Prompt, answer: str | None = None) -> str:
        """Return what the policy reads: a prompt and its answer, or without one the prompt and the generation prompt.

        Raises:
            DataError: If the template fails on these roles.
        """
        turns = as_turns(prompt)
        if answer is not None:
            turns = [*turns, {"role": "assistant", "content": answer}]
        options = {} if self.template is None else {"chat_template": self.template}
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=answer is None, **options
            )
        except Exception as error:  # Jinja raises its own types, and a template may raise anything
            roles = [turn["role"] for turn in turns]
            raise DataError(
                "the chat template",
                f"it failed on the roles {roles}: {clip(str(error), 160)}",
                "If it knows no system role, leave `system_prompt` out; otherwise give another `policy.chat_template`.",
            ) from error
        return str(text)

    def as_shown(self, prompt: Prompt) -> Prompt:
        """Return a prompt whose system message the template shows: where it has no place for one, before the user's."""
        if isinstance(prompt, str) or prompt[0]["role"] != "system":
            return prompt
        system, *turns = prompt
        if not folds_system(self.text, str(system["content"])):
            return prompt
        return with_system(turns, str(system["content"]), fold=True)

    def text_behind_answer(self, prompt: Prompt) -> str:
        """Return what the template puts behind an answer: the end of its turn."""
        text, _, end = answer_place(lambda given: self.text(prompt, given), "z")
        return text[end:]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn rendered texts into ids, one list a text; the template has placed all special tokens already."""
        if not texts:
            return []
        # Lengths are checked by who asks: no word of the library about what is too long.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        found = [list(ids) for ids in encoded]
        if self._check is not None:
            self._check(found)
        return found

    def encode_answer(self, prompt: Prompt, answer: str) -> tuple[list[int], int, int]:
        """Encode a prompt with its answer, and find what the template gives to the answer.

        Returns:
            The ids of the whole text, and which of them [start, stop) hold the answer and the token that ends its turn
            (all that stands behind the answer, where no special token does).
        """
        text, start, end = answer_place(lambda given: self.text(prompt, given), answer)
        ids, before, until = self.encode([text, text[:start], text[:end]])
        # A token that holds characters of both the template and the answer is the answer's.
        first, last = common_start(ids, before), common_start(ids, until)
        ends = end_of_turn(ids[last:], special_ids(self.tokenizer))
        return ids, first, len(ids) if ends is None else last + ends + 1

    def encode_beginning(self, prompt: Prompt, beginning: str) -> list[int]:
        """Encode what an answer begins with, as it stands behind the prompt: its first token may hold a blank.

        Args:
            prompt: The prompt.
            beginning: Text.

        Returns:
            Tokens that go on from the prompt's own. Where those would change behind it, or the template shows an answer
            in another way, the text's alone.
        """
        try:
            text, start, end = answer_place(lambda given: self.text(prompt, given), beginning)
        except DataError:  # a template may know no answers
            return self.encode([beginning])[0]
        whole, before, asked, alone = self.encode([text[:end], text[:start], self.text(prompt), beginning])
        first = common_start(whole, before)
        goes_on = first >= len(asked) and whole[: len(asked)] == asked
        return whole[first:] if goes_on and text[start:end].strip() == beginning.strip() else alone

    def encode_prompts(self, rows: Sequence[PromptRow]) -> list[list[int]]:
        """Render and encode the prompts of rows, without their answers."""
        return self.encode([self.text(row.prompt) for row in rows])
