"""Lightning: private names."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy, Strategy


def process_group_timeout(strategy: Strategy) -> timedelta | None:
    """Return how long the other processes wait in a collective operation; None where no strategy of ours says so."""
    return strategy._timeout if isinstance(strategy, DDPStrategy) else None
