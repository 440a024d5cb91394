"""Which prompts the loaders of validation, test and prediction hold; hooks are told a loader's number alone.

Further loaders hold prompts under attack, and their batches say what these are (`nspo_lightning.attacks`).
"""

from __future__ import annotations

HARMFUL = 0
"""Number of the loader of harmful prompts."""
GENERAL = 1
"""Number of the loader of general prompts."""
