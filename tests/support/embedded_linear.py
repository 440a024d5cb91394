"""The smallest language-like module with a layer to hold: an embedding, read by one linear map."""

from __future__ import annotations

from torch import Tensor, nn


class EmbeddedLinear(nn.Module):
    """Token ids of shape (rows, tokens) to outputs of shape (rows, tokens, 4)."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(words, width), nn.Linear(width, 4, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        outputs: Tensor = self.linear(self.embed(input_ids))
        return outputs
