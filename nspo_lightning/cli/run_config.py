"""A run's configuration as a file, for the commands that need a part of it and not the whole command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from nspo_lightning.cli.run_record import CONFIG
from nspo_lightning.keys import check_no_key
from nspo_lightning.policy.chat_template import with_chat_template
from nspo_lightning.policy.settings import PolicyError, PolicySettings


class ConfigError(ValueError):
    """A configuration that is not there, can't be read, or lacks what a command needs."""


def config_of_run(checkpoint: Path) -> Path:
    """Return the `config.yaml` of a checkpoint's run, beside or above it; PolicyError if there is none."""
    for folder in (checkpoint.absolute().parent, checkpoint.absolute().parent.parent):
        if (folder / CONFIG).is_file():
            return folder / CONFIG
    raise PolicyError(
        f"There is no {CONFIG} beside or above {checkpoint}, so the model is not known. Give the one of its run as "
        "`--config`."
    )


def read_config(path: Path, *, needs: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, Any]:
    """Read a `fit` configuration.

    Args:
        path: YAML.
        needs: Section to the keys that must stand in it.

    Returns:
        Its content.

    Raises:
        ConfigError: If it is not there, is no YAML, or lacks something.
        ValueError: If it holds a key.
    """
    if not path.is_file():
        raise ConfigError(
            f"There is no configuration at {path}: expected the YAML of a `fit`, found nothing at '{path}'. Mend the "
            "path (`--config`)."
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no settings. Give the YAML of a `fit` (`--config`).")
    check_no_key("", content)
    for section, keys in (needs or {}).items():
        values = content.get(section)
        missing = [key for key in keys if not isinstance(values, Mapping) or key not in values]
        if missing:
            raise ConfigError(f"{path} has no `{section}.{missing[0]}`. Give the YAML of a `fit` (`--config`).")
    return content


def policy_settings(config: Mapping[str, Any], source: Path) -> PolicySettings:
    """Read the policy out of a configuration.

    Args:
        config: Content of the configuration.
        source: Its file, for messages.

    Returns:
        `model.policy`, with `data.chat_template` if it has no template; what is not said in it has its default.

    Raises:
        ConfigError: If there is no `model`, or a setting is unknown or of the wrong type.
        PolicyError: If `data` has another chat template.
    """
    model = config.get("model")
    if not isinstance(model, Mapping):
        raise ConfigError(f"{source} has no `model` section. Give the YAML of a `fit` (`--config`).")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=PolicySettings, default=PolicySettings())
    try:
        parsed = parser.instantiate(parser.parse_object({"policy": dict(model.get("policy") or {})}))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(f"{source}: `model.policy` does not fit: {error}") from error
    settings: PolicySettings = parsed.policy
    data = config.get("data")
    return with_chat_template(settings, data.get("chat_template") if isinstance(data, Mapping) else None)
