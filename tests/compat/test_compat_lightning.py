"""Names of Lightning that no promise covers. A failure here says which one is gone and where it was used."""

from __future__ import annotations

from datetime import timedelta

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from nspo_lightning.compat import lightning as compat

VERSION = f"lightning {pl.__version__}"


def test_ddp_keeps_the_timeout_of_its_process_group():
    strategy = DDPStrategy(timeout=timedelta(minutes=5))
    assert vars(strategy).get("_timeout") == timedelta(minutes=5), f"{VERSION}: see DDPStrategy.__init__ in ddp.py"
    assert compat.process_group_timeout(strategy) == timedelta(minutes=5)
    assert compat.process_group_timeout(SingleDeviceStrategy()) is None
