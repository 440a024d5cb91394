"""How far the loading of a model is: transformers tells of each tensor, and a bar of ours shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from nspo_lightning.terminal import Advance, rows_progress

_LOADING = "Loading"
"""How the bars that transformers would draw for the tensors of a model begin."""


@contextmanager
def loading_progress(label: str, *, visible: bool) -> Iterator[None]:
    """Show how many tensors of the models that are loaded inside the block are there, and the time left.

    Args:
        label: What is loaded, as "Loading the policy".
        visible: Whether it is shown; else transformers' own bars are, unless they are switched off.
    """
    with rows_progress(label, unit="tensor", visible=visible) as advance:
        if not visible:
            yield
            return
        with _told_to(advance):
            yield


@contextmanager
def _told_to(advance: Advance) -> Iterator[None]:
    """Send what transformers counts inside the block there; a transformers without such a hook counts for itself."""
    try:
        from transformers.utils.logging import set_tqdm_hook
    except ImportError:  # older than the hook
        yield
        return

    def bar(make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not str(kwargs.get("desc") or "").startswith(_LOADING):
            return make(*args, **kwargs)
        return _Counted(advance, *args, **kwargs)

    before = set_tqdm_hook(bar)
    try:
        yield
    finally:
        set_tqdm_hook(before)


class _Counted:
    """Stands in for one of transformers' bars, and draws nothing.

    Args:
        advance: Is told of each tensor.
        rows: What is gone through; None = `update` is called instead.
        total: How many there are, where they don't tell themselves.
    """

    def __init__(self, advance: Advance, rows: Any = None, *, total: int | None = None, **_: Any) -> None:
        self._advance, self._rows = advance, rows
        advance(0, total=total if total is not None else len(rows) if isinstance(rows, Sized) else None)

    def __iter__(self) -> Iterator[Any]:
        for row in self._rows:
            yield row
            self._advance()

    def update(self, number: int = 1) -> None:
        self._advance(int(number))

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None  # what else a bar can do: close, refresh, say something
