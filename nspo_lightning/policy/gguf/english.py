"""A page of plain English, and how well a language model predicts it: what shows a model that was read wrongly."""

from __future__ import annotations

import torch
from torch import Tensor

PAGE = """Water is one of the most important substances on Earth. It covers about 70 percent of the surface of the \
planet, and most of it is found in the oceans. Only a small part of the water on Earth is fresh water, and much of \
that is frozen in glaciers and in the ice at the North Pole and the South Pole.

All living things need water. Plants take it up from the soil through their roots. Animals drink it, and many of them \
live in it. The human body is made up of about 60 percent water, and a person can live only a few days without drinking.

Water moves through the environment in what is called the water cycle. When the sun heats the surface of the sea, \
water turns into vapor and rises into the air. This process is called evaporation. High in the air the vapor cools \
down and turns into small drops, which form clouds. When the drops become too heavy, they fall to the ground as rain \
or snow. Some of the water flows into rivers and lakes, and from there back into the sea. Some of it sinks into the \
ground, where it can stay for many years.

People use water for many different things. They drink it, cook with it, wash their clothes in it and use it to grow \
food. In the past, towns were often built near a river, because people could get water there, catch fish and travel by \
boat. Today, water is also used to make electricity. In many parts of the world, however, there is not enough clean \
water for everyone. For this reason it is important to save water and to keep rivers and lakes clean.
"""
LIMIT = 3.5
"""Highest mean NLL a token of `PAGE`, in nats, that a model which was read rightly is expected to have.

SmolLM2-135M-Instruct in Q4_1 has 1.86; with the rows of its queries and keys in the other order 4.37, of its keys alone
7.89, and a norm that is off by one 24.0 (benchmarks/gguf_limit.py).
"""


@torch.no_grad()
def nll_per_token(model: torch.nn.Module, ids: Tensor) -> float:
    """Return the mean NLL of all tokens but the first, in nats, of one text's token ids, shape (1, length)."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]))
