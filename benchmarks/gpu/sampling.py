"""Tokens a second and peak memory of sampling, in each mode: decoding x the weights that are sampled with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from device import Device, listening
from made_model import made_bases, policy_settings
from record import Record
from workload import Scale, batches, bf16_roofline, write_folder

from nspo_lightning.grpo import Rollout
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.policy.scoring import score_completions
from nspo_lightning.rollout import SamplingConfig

DECODINGS, WEIGHTS = ("dynamic", "static", "graphs"), ("quantized", "dequantized", "merged")
FIRST = [("graphs", "merged"), ("dynamic", "quantized"), ("graphs", "quantized"), ("graphs", "dequantized")]
REST = [(d, w) for w in WEIGHTS for d in DECODINGS if (d, w) not in FIRST]
LARGEST_GAP = 0.25  # nats; tokens from other logits of the 7B's spread are 1.4 off, the mean's own error is 0.03


class Sampler:
    """A policy with one kind of sampling weights at a time, and rollouts of it."""

    def __init__(self, scale: Scale, device: Device, folder: Path) -> None:
        self.scale, self.device = scale, device
        self._folder = write_folder(scale, folder)
        self._batch = batches(scale, 1, device.torch)[0]
        self._policy: TextPolicy | None = None
        self._weights = ""
        self._first: tuple[str, torch.Tensor] | None = None

    def check(self, decoding: str) -> None:
        """See that the device has such a decoding; NotImplementedError if not."""
        if decoding == "graphs" and not self.device.is_cuda:
            raise NotImplementedError("CUDA graphs are for a card")

    def draw(self, decoding: str, tokens: int, policy: TextPolicy) -> torch.Tensor:
        """Sample completions of a forced length, and return their ids."""
        config = SamplingConfig(max_new_tokens=tokens, min_new_tokens=tokens, decoding=decoding)
        with torch.autocast(self.device.torch.type, torch.bfloat16):  # as under the Trainer
            rollout, _ = policy.generate(self._batch, config, self.scale.group, seed=0)
        shape = tuple(rollout.completion_ids.shape)
        if shape != (self.scale.rows, tokens) or not bool(rollout.completion_mask.all()):
            raise RuntimeError(f"Expected {self.scale.rows} completions of {tokens} tokens, got {shape}.")
        return rollout.completion_ids

    def first_group(self, ids: torch.Tensor) -> Rollout:
        """Return the first prompt with its completions, rows of `ids`."""
        completions = ids[: self.scale.group]
        return Rollout(
            prompt_ids=self._batch["prompt_ids"][:1],
            prompt_mask=self._batch["prompt_mask"][:1],
            group_size=self.scale.group,
            completion_ids=completions,
            completion_mask=torch.ones_like(completions).bool(),
            finished=torch.zeros(len(completions), dtype=torch.bool, device=self.device.torch),
        )

    @torch.no_grad()
    def log_prob_over_entropy(self, policy: TextPolicy, ids: torch.Tensor) -> float:
        """Return the mean of log-probability plus entropy over the first group's tokens, under the trained policy.

        It is zero in the mean for tokens that were drawn from it. Raises RuntimeError where they can't have been.
        """
        with torch.autocast(self.device.torch.type, torch.bfloat16):
            scores = score_completions(policy.require(), self.first_group(ids), with_entropy=True)
        assert scores.entropy is not None  # asked for
        gap = float((scores.log_probs + scores.entropy).mean())
        if not abs(gap) < LARGEST_GAP:
            raise RuntimeError(f"The drawn tokens are {gap:.2f} nats off the policy's own: they are not drawn from it.")
        return gap

    def policy(self, weights: str) -> TextPolicy:
        """Return the policy that samples with these weights, in train mode as training has it."""
        if self._policy is None or weights != self._weights:
            self._policy = None
            self.device.clear()
            made = TextPolicy(
                policy_settings(self._folder, self.scale.rank, checkpointing=True, sampling_weights=weights)
            )
            torch.manual_seed(0)  # the same weights for each mode
            with made_bases():
                made.load(self.device.torch)
            move_(made)
            self._policy, self._weights = made, weights
        return self._policy

    def measure(self, decoding: str, weights: str) -> dict[str, Any]:
        """Measure one mode: a rollout to warm up (with graphs: to capture), then one that counts."""
        self.check(decoding)
        scale, device = self.scale, self.device
        with listening() as heard:
            begin = device.now()
            policy = self.policy(weights)
            made, warm = device.now(), scale.new_tokens if decoding != "dynamic" else scale.warm_up_tokens
            device.clear()
            self.draw(decoding, warm, policy)
            warmed = device.now()
            device.reset_peak()
            ids = self.draw(decoding, scale.new_tokens, policy)
            seconds = device.now() - warmed
        peaks = {"peak_gb": device.peak_gb(), "reserved_gb": device.reserved_gb()}
        gap = self.log_prob_over_entropy(policy, ids)
        tokens = scale.rows * scale.new_tokens
        first, drawn = self._first = self._first or (f"{decoding}+{weights}", ids)
        speed = device.bytes_a_second()
        return {
            "tokens_a_second": tokens / seconds,
            "seconds": seconds,
            "tokens": tokens,
            **peaks,
            "share_of_bf16_roofline": None if speed is None else tokens / seconds / bf16_roofline(scale, speed),
            "log_prob_over_entropy": gap,
            "same_tokens": float((ids == drawn).float().mean()),
            "same_tokens_as": first,
            "warm_up_s": warmed - made,
            "model_made_s": made - begin,
            "said": heard,
        }


def move_(policy: TextPolicy) -> None:
    """Give the adapter's B values, as after some updates: a zero B would leave out what merging has to get right."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.require().named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1e-3)


def main(scale: Scale, device: Device, record: Record, folder: Path, rest: bool, earlier: set[str]) -> None:
    """Measure modes, the most telling first."""
    sampler, modes = Sampler(scale, device, folder), [m for m in FIRST if "+".join(m) not in earlier]
    modes = [*modes, *REST] if rest else FIRST
    slowest = 0.0
    for decoding, weights in modes:
        found = record.attempt(f"{decoding}+{weights}", lambda d=decoding, w=weights: sampler.measure(d, w), slowest)
        if found is not None:
            slowest = max(slowest, found["seconds"])
