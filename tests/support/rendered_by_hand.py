"""What the chat templates of `chat_templates` make of a chat, written down without Jinja: a second opinion."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a family writes a chat; `{}` is where a message's text goes.

    Attributes:
        user: A user's turn.
        assistant: An assistant's turn.
        ask: What stands at the end for an answer to come.
        begin: What every text begins with.
        system: A system turn; None where there is none.
        default: The system turn of chats that have none.
        fold: What the first user turn begins with, in the place of a system turn.
        close: What stands behind a text that ends with an answer.
        added: What the last assistant's turn begins with.
        strips: Whether messages lose the white space around them.
    """

    user: str
    assistant: str
    ask: str
    begin: str = ""
    system: str | None = None
    default: str | None = None
    fold: str | None = None
    close: str = ""
    added: str = ""
    strips: bool = False


def _same(turn: str, ask: str, **more: str | bool) -> Look:
    roles = {role: turn.replace("ROLE", role) for role in ("user", "assistant", "system")}
    return Look(**roles, ask=ask, **more)  # type: ignore[arg-type]


_CHATML, _ASK = "<|im_start|>ROLE\n{}<|im_end|>\n", "<|im_start|>assistant\n"
_GEMMA = {
    "user": "<start_of_turn>user\n{}<end_of_turn>\n",
    "assistant": "<start_of_turn>model\n{}<end_of_turn>\n",
    "ask": "<start_of_turn>model\n",
    "begin": "<bos>",
}
_COMMAND = "<|START_OF_TURN_TOKEN|><|{0}_TOKEN|>"

LOOKS = {
    "llama2": Look(
        user="<s>[INST] {} [/INST]", assistant=" {} </s>", ask="", fold="<<SYS>>\n{}\n<</SYS>>\n\n", strips=True
    ),
    "llama3": _same(
        "<|start_header_id|>ROLE<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        begin="<|begin_of_text|>",
        strips=True,
    ),
    "qwen2.5": _same(_CHATML, _ASK, default="You are Qwen."),
    "qwen3": _same(_CHATML, _ASK, added="<think>\n\n</think>\n\n"),
    "deepseek-r1": Look(
        begin="<｜begin▁of▁sentence｜>",
        system="{}",
        user="<｜User｜>{}",
        assistant="<｜Assistant｜>{}<｜end▁of▁sentence｜>",
        ask="<｜Assistant｜><think>\n",
    ),
    "gemma2": Look(**_GEMMA, strips=True),
    "gemma3": Look(**_GEMMA, fold="{}\n\n", strips=True),
    "mistral": Look(begin="<s>", user="[INST] {}[/INST]", assistant=" {}</s>", ask="", fold="{}\n\n"),
    "phi3": _same("<|ROLE|>\n{}<|end|>\n", "<|assistant|>\n", close="<|endoftext|>"),
    "smollm2": _same(_CHATML, _ASK, default="You are SmolLM."),
    "chatml-on-a-base": _same(_CHATML, _ASK),
    "zephyr": _same("<|ROLE|>\n{}</s>\n", "<|assistant|>\n"),
    "command-r": Look(
        begin="<BOS>",
        system=_COMMAND.format("SYSTEM") + "{}<|END_OF_TURN_TOKEN|>",
        user=_COMMAND.format("USER") + "{}<|END_OF_TURN_TOKEN|>",
        assistant=_COMMAND.format("CHATBOT") + "{}<|END_OF_TURN_TOKEN|>",
        ask=_COMMAND.format("CHATBOT"),
        strips=True,
    ),
    "granite": _same(
        "<|start_of_role|>ROLE<|end_of_role|>{}<|end_of_text|>\n", "<|start_of_role|>assistant<|end_of_role|>"
    ),
    "plain": _same("ROLE: {}\n\n", "assistant: "),
}
ENDS = {"llama2": " </s>", "plain": "\n\n"}  # of a turn, where it is no single token


def by_hand(family: str, chat: list[dict[str, str]], answer: str | None = None, thinks: bool = True) -> tuple[str, str]:
    """Return a family's text of a chat, up to where the answer begins, and the answer with what stands behind it.

    Args:
        family: A name in `LOOKS`.
        chat: Ends with a user turn.
        answer: Follows; None = it is yet to come, and what it would be is "".
        thinks: False = Qwen3's `enable_thinking: false`.
    """
    look, turns = LOOKS[family], list(chat)
    text, folded = look.begin, ""
    if turns[0]["role"] == "system":
        said = turns.pop(0)["content"]
        if look.fold is not None:
            folded = look.fold.format(said)
        else:
            assert look.system is not None
            text += look.system.format(said.strip() if look.strips else said)
    elif look.default is not None:
        assert look.system is not None
        text += look.system.format(look.default)
    first = 0
    if family == "mistral":  # puts it into the last turn, and only if that is the user's
        first = len(turns) - 1 if answer is None else -1
    for place, turn in enumerate(turns):
        form = look.user if turn["role"] == "user" else look.assistant
        trims = look.strips or (family == "mistral" and turn["role"] == "assistant")
        said = turn["content"].strip() if trims else turn["content"]
        text += form.format((folded if place == first else "") + said)
    if answer is None:
        closed = "<think>\n\n</think>\n\n" if family == "qwen3" and not thinks else ""
        return text + look.ask + closed, ""
    before, behind = look.assistant.split("{}")
    kept = answer.strip() if look.strips or family == "mistral" else answer
    kept = kept.lstrip("\n") if family == "qwen3" else kept
    return text + before + look.added, kept + behind + look.close


def scored_text(family: str, answer_and_rest: str) -> int:
    """Return how many characters of an answer and what stands behind it are the answer's, with the end of its turn."""
    behind = LOOKS[family].assistant.split("{}")[1]
    close = LOOKS[family].close
    kept = len(answer_and_rest) - len(behind) - len(close)
    return kept + (len(behind) if family in ENDS else len(behind.rstrip("\n")))
