"""Memory and work of a QLoRA GRPO run from a model's shape: one function a term, all in bytes or FLOPs.

Notation: H hidden size, I intermediate size, Q = heads x head size, K = key-value heads x head size, N layers, V
vocabulary, r LoRA rank. A micro-batch pushes T tokens through the policy, a rollout has P prompts of L tokens with G
completions of C tokens each. `scaling.py` measures the terms on small models (not those of a calibration's second
moments, which are counted from the code); nothing in here is fitted but the coefficients of `Activations`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CHUNK_ELEMENTS = 2**25
"""Elements of one chunk of logits in scoring (nspo_lightning/policy/log_probs.py)."""
BLOCK, NESTED_BLOCK = 64, 256  # bitsandbytes' NF4 with double quantisation
CODES_BYTES = 4 * (16 + 256 + 1)  # its tables and the offset, once a matrix


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder-only model with gated MLPs, as Llama and Qwen2.5."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_size: int = 128
    qkv_bias: bool = False
    tied: bool = False

    @property
    def query(self) -> int:
        """Q."""
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        """K."""
        return self.kv_heads * self.head_size

    @property
    def maps(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's linear maps: q, k, v, o, gate, up, down."""
        h, i, q, k = self.hidden, self.intermediate, self.query, self.key
        return [(h, q), (h, k), (h, k), (q, h), (h, i), (h, i), (i, h)]

    @property
    def inputs(self) -> list[int]:
        """Widths of a layer's distinct inputs: q/k/v share one, gate/up share one."""
        return [self.hidden, self.query, self.hidden, self.intermediate]

    @property
    def linear_parameters(self) -> int:
        """Parameters of all layers' linear maps, without biases."""
        return self.layers * sum(a * b for a, b in self.maps)

    @property
    def other_parameters(self) -> int:
        """Embeddings, head, norms and biases, which are not quantised."""
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        biases = self.layers * (self.query + 2 * self.key) if self.qkv_bias else 0
        return embeddings + (2 * self.layers + 1) * self.hidden + biases


MODELS = (
    Shape(
        name="Qwen2.5-7B",
        hidden=3584,
        intermediate=18944,
        layers=28,
        heads=28,
        kv_heads=4,
        vocabulary=152064,
        qkv_bias=True,
    ),
    Shape(
        name="Qwen2.5-32B",
        hidden=5120,
        intermediate=27648,
        layers=64,
        heads=40,
        kv_heads=8,
        vocabulary=152064,
        qkv_bias=True,
    ),
    Shape(name="Llama-3.1-70B", hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8, vocabulary=128256),
)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a step does, on one device."""

    prompts: int = 8
    group: int = 8
    prompt_tokens: int = 256
    completion_tokens: int = 512
    microbatch_tokens: int = 8192
    rank: int = 16
    null_share: float = 0.5
    domains: int = 1

    def microbatch_rows(self) -> int:
        """Completions of a micro-batch that its budget holds, each group with its prompt."""
        whole, rest = divmod(self.microbatch_tokens, self.prompt_tokens + self.group * self.completion_tokens)
        part = max(0, rest - self.prompt_tokens) // self.completion_tokens
        return max(1, whole * self.group + part)


# ------------------------------------------------------------------------------------------------------------ weights


def base_bytes(shape: Shape, *, other_bytes: int = 2) -> float:
    """NF4 with double quantisation: half a byte, 1 byte a block of 64, 4 bytes for 256 blocks; the rest in 16 bit."""
    packed = sum(a * b for a, b in shape.maps) * (0.5 + 1 / BLOCK + 4 / (BLOCK * NESTED_BLOCK))
    return shape.layers * (packed + CODES_BYTES * len(shape.maps)) + shape.other_parameters * other_bytes


def dequantised_bytes(shape: Shape, *, compute_bytes: int = 2) -> int:
    """The largest linear map in 16 bit: made for the product with its transpose in the backward pass."""
    return max(a * b for a, b in shape.maps) * compute_bytes


def lora_parameters(shape: Shape, rank: int) -> int:
    """A (r x in) and B (out x r) of every linear map."""
    return shape.layers * rank * sum(a + b for a, b in shape.maps)


def lora_bytes(shape: Shape, rank: int) -> int:
    """float32: the parameter, its gradient, Adam's two moments, and the sum that micro-batches add to."""
    return lora_parameters(shape, rank) * 4 * 5


Weights = Literal["quantized", "dequantized", "merged"]
"""What completions are drawn with (`policy.sampling_weights`)."""


def sampling_copy_bytes(shape: Shape, weights: Weights, *, compute_bytes: int = 2) -> int:
    """The copy of all linear maps, alive while completions are drawn."""
    return 0 if weights == "quantized" else shape.linear_parameters * compute_bytes


def read_bytes(shape: Shape, rank: int, weights: Weights, *, fused: bool = False, compute_bytes: int = 2) -> float:
    """Bytes that move for one step of decoding: linear maps, the adapter in float32, and the rest of the base.

    Of 4-bit weights a product with few rows reads the packed ones alone (`fused`); with more rows they are read,
    written in 16 bit and read again.
    """
    packed = 0.5 + 1 / BLOCK + 4 / (BLOCK * NESTED_BLOCK)
    a_parameter = packed + (0 if fused else 2 * compute_bytes) if weights == "quantized" else compute_bytes
    adapter = 0 if weights == "merged" else lora_parameters(shape, rank) * 4
    return shape.linear_parameters * a_parameter + adapter + shape.other_parameters * 2


# -------------------------------------------------------------------------------------------------------- activations


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes a token that one layer keeps for its backward pass: constant + h H + i I + k K, measured."""

    constant: float
    h: float
    i: float
    k: float

    def layer_bytes(self, shape: Shape, tokens: int) -> float:
        """Of one layer, without the copies that `key_copies_bytes` counts."""
        a_token = self.constant + self.h * shape.hidden + self.i * shape.intermediate + self.k * shape.key
        return tokens * a_token


def key_copies_bytes(shape: Shape, rows: int, length: int, *, element_bytes: int = 2) -> int:
    """Keys and values that a layer's attention lays out for each completion: its prompt's and its own."""
    return 2 * rows * length * shape.key * element_bytes


def activation_bytes(
    shape: Shape, load: Load, kept: Activations, *, checkpointing: bool = True, element_bytes: int = 2
) -> float:
    """A micro-batch's: every layer's own, or each layer's input and one layer's own while it is run again."""
    tokens = load.microbatch_tokens
    length = load.prompt_tokens + load.completion_tokens
    layer = kept.layer_bytes(shape, tokens) + key_copies_bytes(
        shape, load.microbatch_rows(), length, element_bytes=element_bytes
    )
    return shape.layers * tokens * shape.hidden * element_bytes + layer if checkpointing else shape.layers * layer


def logits_bytes(shape: Shape, *, copies: float) -> float:
    """One chunk of logits, so many times in float32: the logits, their softmax, and what is made from them."""
    return max(64, CHUNK_ELEMENTS // shape.vocabulary) * shape.vocabulary * 4 * copies


# ----------------------------------------------------------------------------------------------------------- sampling


def capacity(tokens: int) -> int:
    """Tokens that a row's own buffer has room for: 32, doubled whenever it is full."""
    room = 32
    while room < tokens:
        room *= 2
    return room


def cache_bytes(shape: Shape, load: Load, *, element_bytes: int = 2) -> int:
    """Keys and values of all layers: each prompt once, and a buffer for each completion."""
    a_token = 2 * shape.layers * shape.key * element_bytes
    rows = load.prompts * load.group
    return a_token * (load.prompts * load.prompt_tokens + rows * capacity(load.completion_tokens - 1))


# --------------------------------------------------------------------------------------------------------- null space


def basis_bytes(shape: Shape, null_share: float) -> float:
    """float32, for each distinct input the protected directions or the null ones, whichever are fewer."""
    return shape.layers * sum(4.0 * width * round(min(null_share, 1 - null_share) * width) for width in shape.inputs)


def gram_bytes(width: int, domains: int) -> float:
    """Sums for each domain (float64 up to 8192, else float32) and one float32 product, while text is read."""
    return width * width * ((8.0 if width <= 8192 else 4.0) * domains + 4.0)


def grams_bytes(shape: Shape, domains: int) -> float:
    """Of all layers at once; `memory_budget_gb` splits them over passes."""
    return shape.layers * sum(gram_bytes(width, domains) for width in shape.inputs)


# --------------------------------------------------------------------------------------------------------------- work


def forward_flops(shape: Shape, tokens: float, *, rank: int) -> float:
    """Products with the base's and the adapter's matrices, without attention and head."""
    return 2.0 * tokens * (shape.linear_parameters + lora_parameters(shape, rank))


def attention_flops(shape: Shape, pairs: float) -> float:
    """Scores and weighted values for so many (query, key) pairs."""
    return 4.0 * shape.layers * pairs * shape.query


def head_flops(shape: Shape, tokens: float) -> float:
    """Logits of so many tokens."""
    return 2.0 * tokens * shape.vocabulary * shape.hidden


def pairs(load: Load, *, sampling: bool) -> float:
    """(query, key) pairs of a step. Kernels on masks compute all of L + C keys, the sampler what is there."""
    rows, length, own = load.prompts * load.group, load.prompt_tokens, load.completion_tokens
    prompts = load.prompts * length * length
    if sampling:
        return prompts + rows * sum(length + t + 1 for t in range(own - 1))
    return prompts + rows * (own - 1) * (length + own - 1)


def sampling_flops(shape: Shape, load: Load) -> float:
    """Prompts once, then each completion token but the last, which nothing comes after."""
    rows = load.prompts * load.group
    tokens = load.prompts * load.prompt_tokens + rows * (load.completion_tokens - 1)
    head = load.prompts + rows * (load.completion_tokens - 1)
    linear = forward_flops(shape, tokens, rank=load.rank)
    return linear + head_flops(shape, head) + attention_flops(shape, pairs(load, sampling=True))


def scoring_flops(shape: Shape, load: Load) -> float:
    """The forward pass with gradients; the head's own gradient is made in it, at the price of a second product."""
    rows = load.prompts * load.group
    tokens = load.prompts * load.prompt_tokens + rows * (load.completion_tokens - 1)
    linear = forward_flops(shape, tokens, rank=load.rank)
    head = 2 * head_flops(shape, rows * load.completion_tokens)
    return linear + head + attention_flops(shape, pairs(load, sampling=False))


def backward_flops(shape: Shape, load: Load, *, checkpointing: bool = False, attention_factor: float = 2.5) -> float:
    """Gradients of inputs through the frozen base, of inputs and weights in the adapter, and attention's.

    Attention costs 2.5 forward passes where the kernel computes scores again (flash), 2 where they are kept.
    """
    rows = load.prompts * load.group
    tokens = load.prompts * load.prompt_tokens + rows * (load.completion_tokens - 1)
    base = 2.0 * tokens * shape.linear_parameters
    adapter = 4.0 * tokens * lora_parameters(shape, load.rank)
    attention = attention_flops(shape, pairs(load, sampling=False))
    again = forward_flops(shape, tokens, rank=load.rank) + attention if checkpointing else 0.0
    return base + adapter + attention_factor * attention + again
