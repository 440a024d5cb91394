"""Part of nspo_lightning."""
