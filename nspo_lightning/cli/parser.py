"""The parser of one job's arguments."""

from __future__ import annotations

from typing import Any, NoReturn

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from nspo_lightning.cli.errors import mask_keys


class Parser(LightningArgumentParser):
    """Takes a path among data or calibration settings as what it is, not as a file with settings to be read.

    What it says of a wrong option repeats no key.
    """

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(mask_keys(message), ex)
        raise AssertionError  # it has exited

    @override
    def format_usage(self) -> str:
        return f"usage: {self.prog} [-c FILE] [--SECTION.OPTION VALUE ...]\n"

    @override
    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        if nested_key not in {"data", "nullspace"}:
            return super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, required)
        if issubclass(lightning_class, Callback):
            self.callback_keys.append(nested_key)
        added: list[str] = self.add_class_arguments(lightning_class, nested_key, fail_untyped=False)
        return added

    @override
    def add_method_arguments(self, class_type: type, method_name: str, *args: Any, **kwargs: Any) -> list[str]:
        # The arguments of the job `data` can't be a group of that name: it is the datamodule's.
        if method_name == "data":
            kwargs["as_group"] = False
        added: list[str] = super().add_method_arguments(class_type, method_name, *args, **kwargs)
        return added
