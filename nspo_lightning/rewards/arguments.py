"""What a reward is called with, and whether it is async: TRL's rules, minus the need for **kwargs."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from nspo_lightning.rewards.protocol import Reward, RewardError

__all__ = ["accepted_arguments", "is_async", "reward_name"]


def reward_name(reward: Callable[..., Any]) -> str:
    """Name a reward for TensorBoard and messages.

    Args:
        reward: a function, a partial of one, or an instance with `__call__`.

    Returns:
        Its `name` attribute if that is a non-empty string, else the function's or class's name (a class in snake case).
    """
    given = getattr(reward, "name", None)
    if isinstance(given, str) and given:
        return given
    while isinstance(reward, functools.partial):
        reward = reward.func
    if hasattr(reward, "__name__"):
        return str(reward.__name__)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(reward).__name__).lower()


def is_async(reward: Callable[..., Any]) -> bool:
    """Tell whether calling a reward gives an awaitable: it is an async function, is called by one, or says so."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    says_so = isinstance(reward, Reward) and reward.is_async
    return says_so or inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def accepted_arguments(name: str, reward: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the keyword arguments that a reward can take.

    Args:
        name: the reward's name, for messages.
        reward: the callable.
        arguments: everything that there is to pass.

    Returns:
        All of them if the reward takes `**kwargs`, else those that it names.

    Raises:
        RewardError: if it needs an argument that is not there.
    """
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return dict(arguments)
    kinds = inspect.Parameter
    if any(parameter.kind is kinds.VAR_KEYWORD for parameter in parameters):
        accepted = dict(arguments)
    else:
        named = {p.name for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
        accepted = {key: value for key, value in arguments.items() if key in named}
    for parameter in parameters:
        if parameter.kind is kinds.POSITIONAL_ONLY:
            raise RewardError(
                f"Reward '{name}' must take its arguments by keyword, as TRL passes them, but '{parameter.name}' is "
                f"positional only. Remove the `/` from its signature.",
                name,
            )
        variadic = parameter.kind in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
        if not variadic and parameter.default is kinds.empty and parameter.name not in accepted:
            raise RewardError(
                f"Reward '{name}' needs the argument '{parameter.name}', but the batch has only "
                f"{', '.join(sorted(arguments))}. Add the column to the data, or give the argument a default.",
                name,
            )
    return accepted
