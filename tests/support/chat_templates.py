"""Chat templates that behave as those of the most used model families do, each with a tokenizer of its markers.

Short, and true to what matters here: system turns (own, default, folded into the user's, refused), roles that must
alternate, white space that is trimmed, thoughts that are added, stripped or begun, and what stands behind an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family's template.

    Attributes:
        template: Jinja.
        special: Its special tokens; the first is the pad token.
        eos: What the tokenizer calls EOS.
        end: What ends an assistant's turn, with the white space that stands before it.
        bos: What begins a text.
        trims: Whether the white space around an answer goes.
        drops_thought: Whether a thought in an answer goes.
        system: Whether there may be a system turn.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    end: str
    bos: str | None = None
    trims: bool = False
    drops_thought: bool = False
    system: bool = True


_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
)
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _default_system(text: str) -> str:
    return f"{{% if messages[0].role != 'system' %}}<|im_start|>system\n{text}<|im_end|>\n{{% endif %}}"


_QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set content = m.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
_R1 = (
    "{% set ns = namespace(system='') %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}"
    "{{ bos_token }}{{ ns.system }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
_FOLDED_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set first = FOLD %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
)
_GEMMA_TURNS = (
    "{% for m in TURNS %}"
    + _ALTERNATE
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "FIRST{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_SENTENCE_TOKENS = ("<unk>", "<s>", "</s>")
_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

FAMILIES = {
    "llama2": Family(
        template=_FOLDED_SYSTEM.replace("FOLD", "'<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n'")
        + "{% for m in turns %}"
        + _ALTERNATE
        + "{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (first if loop.first else '') + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        special=_SENTENCE_TOKENS,
        bos="<s>",
        eos="</s>",
        end=" </s>",
        trims=True,
    ),
    "llama3": Family(
        template="{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        special=("<|pad|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        end="<|eot_id|>",
        trims=True,
    ),
    "qwen2.5": Family(
        template=_default_system("You are Qwen.") + _CHATML, special=_CHATML_TOKENS, eos="<|im_end|>", end="<|im_end|>"
    ),
    "qwen3": Family(template=_QWEN3, special=_CHATML_TOKENS, eos="<|im_end|>", end="<|im_end|>"),
    "deepseek-r1": Family(
        template=_R1,
        special=("<｜pad｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        end="<｜end▁of▁sentence｜>",
        drops_thought=True,
    ),
    "gemma2": Family(
        template="{{ bos_token }}"
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + _GEMMA_TURNS.replace("TURNS", "messages").replace("FIRST", ""),
        special=_GEMMA_TOKENS,
        bos="<bos>",
        eos="<eos>",
        end="<end_of_turn>",
        trims=True,
        system=False,
    ),
    "gemma3": Family(
        template="{{ bos_token }}"
        + _FOLDED_SYSTEM.replace("FOLD", "messages[0].content + '\n\n'")
        + _GEMMA_TURNS.replace("TURNS", "turns").replace("FIRST", "{{ first if loop.first else '' }}"),
        special=_GEMMA_TOKENS,
        bos="<bos>",
        eos="<eos>",
        end="<end_of_turn>",
        trims=True,
    ),
    "mistral": Family(
        template=_FOLDED_SYSTEM.replace("FOLD", "messages[0].content + '\n\n'")
        + "{{ bos_token }}{% for m in turns %}"
        + _ALTERNATE
        + "{% if m.role == 'user' %}{{ '[INST] ' + (first if loop.last else '') + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
        special=(*_SENTENCE_TOKENS, "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        end="</s>",
        trims=True,
    ),
    "phi3": Family(
        template="{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        special=("<unk>", "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
        eos="<|endoftext|>",
        end="<|end|>",
    ),
    "smollm2": Family(
        template=_default_system("You are SmolLM.") + _CHATML,
        special=_CHATML_TOKENS,
        eos="<|im_end|>",
        end="<|im_end|>",
    ),
    "chatml-on-a-base": Family(template=_CHATML, special=_CHATML_TOKENS, eos="<|endoftext|>", end="<|im_end|>"),
    "zephyr": Family(
        template="{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        special=_SENTENCE_TOKENS,
        eos="</s>",
        end="</s>",
    ),
    "command-r": Family(
        template="{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + "
        "{'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[m.role] + '_TOKEN|>' + m.content.strip() + "
        "'<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        special=("<PAD>", "<BOS>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        bos="<BOS>",
        eos="<|END_OF_TURN_TOKEN|>",
        end="<|END_OF_TURN_TOKEN|>",
        trims=True,
    ),
    "granite": Family(
        template="{% for m in messages %}"
        "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
        special=("<|pad|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        eos="<|end_of_text|>",
        end="<|end_of_text|>",
    ),
    "plain": Family(
        template="{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        special=("<|endoftext|>",),
        eos="<|endoftext|>",
        end="\n\n",
    ),
}

_TEXTS = [
    "assistant: 42.\n\n",
    "\n\nThe answer is 42.\n",
    "[/INST] 42 </s>",
    "<think>\n\n</think>\n\nYes. It is 7.\n\n",
]


def byte_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes with <|pad|>, <|end|>, which is its EOS, and further special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast


def family_tokenizer(name: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with the family's special tokens, whose merges cross words, spaces and lines."""
    family = FAMILIES[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_TEXTS * 50, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=family.special[0], eos_token=family.eos, bos_token=family.bos
    )
    fast.add_tokens(list(family.special), special_tokens=True)  # added as special, without a role, as on the hub
    fast.chat_template = family.template if template is None else template
    return fast
