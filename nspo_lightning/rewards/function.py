"""A reward function by its dotted path, so that a YAML can name any TRL-style function."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from nspo_lightning.rewards.arguments import is_async, reward_name
from nspo_lightning.rewards.protocol import Reward, Scores

__all__ = ["FunctionReward", "as_reward", "import_reward"]


def import_reward(path: str) -> Callable[..., Any]:
    """Import a callable by its dotted path.

    Args:
        path: `package.module.function`, also `package.module.Class.method`.

    Returns:
        The callable.

    Raises:
        ValueError: if there is no such module or name.
        ModuleNotFoundError: if the module is there but lacks something that it imports.
        TypeError: if what is there can't be called.
    """
    module_name, parts = path, list[str]()
    while True:
        try:
            found: Any = importlib.import_module(module_name)
            break
        except ModuleNotFoundError as error:
            # A missing import *inside* the module must stay visible, not turn into "no such reward".
            if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
                raise
            if "." not in module_name:
                raise ValueError(
                    f"`path` must be an importable `package.module.function`, got '{path}': there is no module "
                    f"'{error.name}'. Install its package, or start the command in its folder with `python -m`."
                ) from None
            module_name, _, last = module_name.rpartition(".")
            parts.insert(0, last)
    for part in parts:
        if not hasattr(found, part):
            raise ValueError(f"`path` '{path}' names nothing: '{module_name}' has no '{part}'. Correct its spelling.")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"`path` '{path}' must name a callable, got {type(found).__name__}. Name the function in it.")
    return found  # type: ignore[no-any-return]


class FunctionReward(Reward):
    """TRL's protocol around a function named by its path.

    Args:
        path: `package.module.function`; sync or async. A class is instantiated with `kwargs`.
        name: how TensorBoard and messages call it; the function's own name by default.
        kwargs: arguments that are the same in every call.
    """

    def __init__(self, path: str, name: str | None = None, kwargs: dict[str, Any] | None = None) -> None:
        found = import_reward(path)
        self.kwargs = dict(kwargs or {})
        if isinstance(found, type):
            found, self.kwargs = found(**self.kwargs), {}
        self.path = path
        self.function: Callable[..., Any] = found
        self.name = name or reward_name(found)
        self.is_async = is_async(found)

    @property
    def __signature__(self) -> inspect.Signature:
        """The function's own signature, less the arguments given by `kwargs`."""
        signature = inspect.signature(self.function)
        kept = [parameter for key, parameter in signature.parameters.items() if key not in self.kwargs]
        return signature.replace(parameters=kept)

    def __call__(self, **arguments: Any) -> Scores:  # type: ignore[override]  # takes what the function takes
        """Score one batch.

        Args:
            **arguments: `prompts`, `completions` and the columns that the function takes.

        Returns:
            What the function returns (a coroutine if it is async).
        """
        return self.function(**arguments, **self.kwargs)  # type: ignore[no-any-return]


def as_reward(reward: str | Callable[..., Any]) -> Callable[..., Any]:
    """Take a reward or its dotted path.

    Returns:
        The reward.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(reward, str):
        return FunctionReward(reward)
    if not callable(reward):
        raise TypeError(
            f"A reward must be a callable `reward(prompts, completions, **columns)` or a dotted path, got "
            f"{type(reward).__name__}."
        )
    return reward
