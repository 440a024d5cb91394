"""A tiny Llama that has learnt the page of plain English by heart, and GGUF files of it as llama.cpp writes them."""

from __future__ import annotations

import json

import gguf
import torch
from tiny_policies import small_llama

from nspo_lightning.policy.gguf.english import PAGE
from nspo_lightning.toy.train_tokenizer import train_tokenizer

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def learnt_page():
    """Return (model, tokenizer)."""
    tokenizer = train_tokenizer([PAGE], 320)
    torch.manual_seed(0)
    sizes = {"intermediate_size": 128, "max_position_embeddings": 512, "initializer_range": 0.02}
    model = small_llama(tokenizer, head_dim=32, tie_word_embeddings=True, **sizes)
    ids = tokenizer(PAGE, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer


def llama_cpp_rows(weight, heads):
    """Put the rows of a query or key projection in llama.cpp's order."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(
    path, model, tokenizer, *, template=TEMPLATE, permute=True, kind="F32", architecture="llama", fields=(), **extra
):
    """Write a GGUF file; `fields` are further (key, text or number), `extra` further tensors."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_name("tiny")
    _add_tokenizer(writer, tokenizer, template)
    for key, value in fields:
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for name, tensor in model.named_parameters():
        value = tensor.detach()
        if permute and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = llama_cpp_rows(value, heads)
        kept = "F32" if value.ndim == 1 else kind
        quantised = gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType[kept])
        writer.add_tensor(_name(name), quantised, raw_dtype=gguf.GGMLQuantizationType[kept])
    for name, value in extra.items():
        writer.add_tensor(name.replace("__", "."), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(name):
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    inner, ending = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[inner]}.{ending}"


def _add_tokenizer(writer, tokenizer, template):
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    special = {token["content"] for token in inner["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in inner["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if template:
        writer.add_chat_template(template)
