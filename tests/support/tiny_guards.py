"""Tiny guards of the real architectures, written to disk as the hub would hold them.

Each memorises a few conversations in its family's reply format, so that plain greedy decoding writes a whole reply
that the label-token reading can be compared with.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WORDS = ["kettle", "ladder", "violin", "harbor", "pencil", "window", "garden", "copper"]
CONVERSATIONS = [(f"tell me about the {a}", f"the {a} and the {b}") for a in WORDS for b in WORDS[:2]]
TRAINED = CONVERSATIONS[::2]

MARKS = {
    "llama_guard": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "llama_guard_4": ["<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"],
    "qwen3guard": ["<|im_start|>", "<|im_end|>"],
    "wildguard": ["<s>", "</s>"],
    "shieldgemma": ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"],
    "harmbench": ["<s>", "</s>"],
}

# Short, in each family's own form: strings, lists of parts, a guideline; WildGuard's and HarmBench's have none.
_TURNS = "{% for m in messages %}{{ 'User' if m.role == 'user' else 'Agent' }}: {{ m.content | trim }}\n{% endfor %}"
_PARTS = (
    "{% for m in messages %}{{ m.role }}: "
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}\n{% endfor %}"
)
CHAT_TEMPLATES = {
    "llama_guard": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n" + _TURNS
    + "<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    "llama_guard_4": "<|begin_of_text|><|header_start|>user<|header_end|>\n\n" + _PARTS
    + "<|eot|><|header_start|>assistant<|header_end|>{{ '\n\n' }}",
    "qwen3guard": "<|im_start|>user\n" + _TURNS
    + "<|im_end|>\n{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>{{ '\n\n' }}{% endif %}",
    "shieldgemma": "<bos>Policy: {{ guideline }}\n<start_of_turn>\n" + _TURNS + "<end_of_turn>\nYes or No?{{ '\n\n' }}",
}  # fmt: skip
TEMPLATES = {
    "wildguard": "<s><|user|>\n[INST] {{ prompt }}\n{{ completion }} [/INST]\n<|assistant|>",
    "harmbench": "<s>[INST] {{ prompt }}\n{{ completion }} [/INST]",
}
GUIDELINES = {"one": "none of the first kind", "two": "nothing of the second"}


def reply(family, number, guideline=None):
    """What the guard was taught to answer on a conversation."""
    bad = number % 2 == 1
    match family:
        case "llama_guard":
            return "\n\nunsafe\nS1,S10" if bad else "\n\nsafe"
        case "llama_guard_4":
            return "unsafe\nS9" if bad else "safe"
        case "qwen3guard":
            safety = ("Safe", "Unsafe", "Controversial")[number % 3]
            categories = "None" if safety == "Safe" else "Violent, PII"
            return f"Safety: {safety}\nCategories: {categories}\nRefusal: {'Yes' if number % 4 == 0 else 'No'}"
        case "wildguard":
            answers = ("yes", "yes" if number % 4 == 0 else "no", "yes" if bad else "no")
            return "Harmful request: {}\nResponse refusal: {}\nHarmful response: {}".format(*answers)
        case "shieldgemma":
            return "Yes" if (number % 4 == 3 if guideline == "two" else bad) else "No"
        case "harmbench":
            return " yes" if bad else " no"


def make_tokenizer(family):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*MARKS[family], "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{p}\n{c}" for p, c in CONVERSATIONS]
    texts += [reply(family, n, g) for n in range(12) for g in GUIDELINES] * 5
    tokenizer.train_from_iterator([*texts, "safe unsafe Safe Unsafe Controversial Yes No yes no"] * 3, trainer)
    eos = MARKS[family][-1] if family != "llama_guard_4" else "<|eot|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=MARKS[family][0], eos_token=eos, pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATES.get(family)
    return fast


def make_model(family, tokenizer):
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **ids,
    }
    match family:
        case "llama_guard" | "harmbench":
            return LlamaForCausalLM(LlamaConfig(**size))
        case "llama_guard_4":
            text = {
                **size,
                "intermediate_size_mlp": 128,
                "num_local_experts": 2,
                "head_dim": 16,
                "interleave_moe_layer_step": 2,
            }
            vision = {
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32,
                "projector_output_dim": 32,
            }  # fmt: skip
            return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision, **ids))
        case "qwen3guard":
            return Qwen3ForCausalLM(Qwen3Config(**size, head_dim=16))
        case "wildguard":
            return MistralForCausalLM(MistralConfig(**size, sliding_window=None))
        case "shieldgemma":
            return Gemma2ForCausalLM(Gemma2Config(**size, head_dim=16, query_pre_attn_scalar=16))


def guard_prompt(family, tokenizer, conversation, guideline=None):
    """The prompt, written without the code under test."""
    prompt, completion = conversation
    if family in TEMPLATES:
        return TEMPLATES[family].replace("{{ prompt }}", prompt).replace("{{ completion }}", completion)
    wrap = (lambda text: [{"type": "text", "text": text}]) if family == "llama_guard_4" else (lambda text: text)
    chat = [{"role": "user", "content": wrap(prompt)}, {"role": "assistant", "content": wrap(completion)}]
    extra = {"guideline": GUIDELINES[guideline]} if guideline else {}
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **extra)


def asked(family):
    """(conversation, number, guideline) of everything that the guard is asked in training."""
    guidelines = list(GUIDELINES) if family == "shieldgemma" else [None]
    return [(conversation, n, g) for n, conversation in enumerate(TRAINED) for g in guidelines]


def teach(family, model, tokenizer):
    rows, labels = [], []
    for conversation, number, guideline in asked(family):
        head = guard_prompt(family, tokenizer, conversation, guideline)
        whole = tokenizer(head + reply(family, number, guideline), add_special_tokens=False)["input_ids"]
        whole.append(tokenizer.eos_token_id)
        start = len(tokenizer(head, add_special_tokens=False)["input_ids"])
        rows.append(whole)
        labels.append([-100] * start + whole[start:])
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    target = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(150):
        loss = model(input_ids=ids, attention_mask=mask, labels=target).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.05:
            break
    model.eval()
    return loss.item()


def save_guard(family, folder):
    """Write a taught guard to a folder.

    Returns:
        The final loss.
    """
    tokenizer = make_tokenizer(family)
    model = make_model(family, tokenizer)
    loss = teach(family, model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss
