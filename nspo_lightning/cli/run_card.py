"""The card of a run's `adapter/`: the same as an export's, out of the checkpoint that the adapter was taken from."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from nspo_lightning.atomic import replacing
from nspo_lightning.checkpoints import FOLDER, LAST_FILE
from nspo_lightning.cli.run_config import ConfigError, policy_settings, read_config
from nspo_lightning.cli.run_record import latest_record
from nspo_lightning.export.card import card
from nspo_lightning.export.merge import certificates
from nspo_lightning.export.trained import export_source, read_summary, read_trained
from nspo_lightning.policy.settings import PolicyError

CARD = "README.md"


def write_card(run: Path) -> None:
    """Write the card of a run that has ended; nothing where there is one, or nothing to write it from.

    Args:
        run: The run's folder.
    """
    adapter, config_file = run / "adapter", latest_record(run)
    checkpoint = run / FOLDER / str(read_summary(run).get("checkpoint") or LAST_FILE)
    if config_file is None or not adapter.is_dir() or (adapter / CARD).exists() or not checkpoint.is_file():
        return
    try:
        config = read_config(config_file)
        settings = policy_settings(config, config_file)
        source = export_source(checkpoint, read_trained(checkpoint), config_file, config, settings)
        whole = settings.lora is None
        text = card(
            source,
            certificates=[] if whole else certificates(source),
            merged=[] if whole else None,
            dtype=settings.dtype if whole else "float32",
            name=f"{run.absolute().name} (adapter)" if not whole else run.absolute().name,
        )
    except (ConfigError, PolicyError, ValueError, OSError) as error:  # the run itself is sound
        rank_zero_info(f"No card in {adapter}: {error}")
        return
    with replacing(adapter / CARD) as partial:
        partial.write_text(text, encoding="utf-8")
