"""Lightning datamodules: safety prompts, general-capability text, and the module that holds both."""

from nspo_lightning.datamodules.alignment import AlignmentDataModule
from nspo_lightning.datamodules.general import GeneralDataModule
from nspo_lightning.datamodules.safety import SafetyDataModule
from nspo_lightning.datamodules.sources.data_error import DataError
from nspo_lightning.datamodules.sources.presets import Preset
from nspo_lightning.datamodules.sources.registry import preset_names, register
from nspo_lightning.datamodules.sources.source import PromptSource

__all__ = [
    "AlignmentDataModule",
    "DataError",
    "GeneralDataModule",
    "Preset",
    "PromptSource",
    "SafetyDataModule",
    "preset_names",
    "register",
]
