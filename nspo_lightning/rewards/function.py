"""Reward functions: what one is called, whether it is async, and how a YAML names it by its dotted path."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from nspo_lightning.rewards.protocol import Reward, SaysIfMessages, Scores

_MESSAGES = re.compile(r"\b(?:dict|Dict|Mapping|TypedDict)\b")


def reward_name(reward: Callable[..., Any]) -> str:
    """Name a reward: by its `name` if that is a non-empty string, else as its function or class (in snake case)."""
    given = getattr(reward, "name", None)
    if isinstance(given, str) and given:
        return given
    function = _without_partials(reward)
    own = getattr(function, "__name__", None)
    return str(own) if own else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(function).__name__).lower()


def is_async(reward: Callable[..., Any]) -> bool:
    """Tell whether calling a reward gives an awaitable: it is an async function, is called by one, or says so."""
    reward = _without_partials(reward)
    says_so = isinstance(reward, _SaysIfAsync) and reward.is_async is True
    return says_so or inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def takes_messages(reward: Callable[..., Any]) -> bool:
    """Return whether a reward wants chats as messages: it says so by `messages`, or annotates completions with dicts.

    Example:
        >>> def brief(prompts, completions): ...
        >>> def of_chats(prompts, completions: list[list[dict[str, str]]]): ...
        >>> takes_messages(brief), takes_messages(of_chats)
        (False, True)
    """
    reward = _without_partials(reward)
    if isinstance(reward, SaysIfMessages):
        return reward.messages is True
    try:
        completions = inspect.signature(reward).parameters.get("completions")
    except (TypeError, ValueError):  # builtins without a signature
        return False
    return completions is not None and _MESSAGES.search(str(completions.annotation)) is not None


def import_reward(path: str) -> Callable[..., Any]:
    """Return the callable that a path `package.module.function`, or `package.module.Class.method`, names.

    Raises:
        ValueError: If there is no such module or name.
        ModuleNotFoundError: If the module is there but lacks something that it imports.
        TypeError: If what is there can't be called.
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
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ValueError(
                f"`path` '{path}' names nothing: '{module_name}' has no '{part}'. Correct its spelling."
            ) from None
    if not callable(found):
        raise TypeError(f"`path` '{path}' must name a callable, got {type(found).__name__}. Name the function in it.")
    return found  # type: ignore[no-any-return]


class FunctionReward(Reward):
    """TRL's protocol around a function named by its path.

    Args:
        path: `package.module.function`; sync or async. A class is instantiated with `kwargs`.
        name: What TensorBoard and messages call it; the function's own name by default.
        kwargs: Arguments that are the same in every call.
        messages: Whether chats come as messages, as in TRL; false = as text; null = as the function says, by an
            attribute `messages` or by an annotation of `completions` with dicts, else as text.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        kwargs: dict[str, Any] | None = None,
        messages: bool | None = None,
    ) -> None:
        found = import_reward(path)
        self.kwargs = dict(kwargs or {})
        if isinstance(found, type):
            found, self.kwargs = found(**self.kwargs), {}
        self.path = path
        self.function: Callable[..., Any] = found
        self.name = name or reward_name(found)
        self.is_async = is_async(found)
        self.messages = takes_messages(found) if messages is None else messages

    @property
    def __signature__(self) -> inspect.Signature:
        """The function's own signature, less the arguments given by `kwargs`."""
        signature = inspect.signature(self.function)
        kept = [parameter for key, parameter in signature.parameters.items() if key not in self.kwargs]
        return signature.replace(parameters=kept)

    def __call__(self, **arguments: Any) -> Scores:  # type: ignore[override]  # takes what the function takes
        """Return what the function returns (a coroutine if it is async)."""
        return self.function(**arguments, **self.kwargs)  # type: ignore[no-any-return]


def as_reward(reward: str | Callable[..., Any]) -> Callable[..., Any]:
    """Take a reward, or import it by its dotted path."""
    if isinstance(reward, str):
        return FunctionReward(reward)
    if not callable(reward):
        raise TypeError(
            f"A reward must be a callable `reward(prompts, completions, **columns)` or a dotted path, got "
            f"{type(reward).__name__}."
        )
    return reward


@runtime_checkable
class _SaysIfAsync(Protocol):
    is_async: bool


def _without_partials(reward: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward
