"""jsonargparse's message about a union still has the form that `told_reason` reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from nspo_lightning.compat.jsonargparse import Complaint, read_complaint, told_reason


class Positive:
    def __init__(self, number: int = 1) -> None:
        if number < 1:
            raise ValueError("`number` must be at least 1")


def test_the_reason_is_found_in_the_message() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=int | Positive)
    given = {"x": {"class_path": f"{__name__}.Positive", "init_args": {"number": 0}}}
    with pytest.raises(ValueError, match="at least 1") as caught:
        parser.instantiate(parser.parse_object(given))
    assert told_reason(str(caught.value)) == "`number` must be at least 1", (
        "see raise_union_unexpected_value in jsonargparse/_typehints.py for the words of the message"
    )


def test_other_messages_stay() -> None:
    assert told_reason("`group_size` must be at least 2, got 1.") == "`group_size` must be at least 2, got 1."


class Judge:
    def __init__(self, threshold: float = 0.5) -> None:
        pass


class Wrapped:
    def __init__(self, judge: Judge | None = None) -> None:
        pass


def complaint(value: object, kind: object) -> Complaint:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=kind)
    with pytest.raises(ArgumentError) as caught:
        parser.parse_object({"x": value}) if not isinstance(value, str) else parser.parse_args([f"--x={value}"])
    return read_complaint(str(caught.value))


def test_what_a_parser_has_against_a_configuration_is_read_from_its_words() -> None:
    inner = {"class_path": f"{__name__}.Judge", "init_args": {"treshold": 1}}
    found = complaint({"class_path": f"{__name__}.Wrapped", "init_args": {"judge": inner}}, int | Wrapped)
    assert (found.path, found.unknown) == (("x", "judge"), "treshold")
    assert found.class_path == f"{__name__}.Judge"
    inner = {"class_path": f"{__name__}.Judge", "init_args": {"threshold": "high"}}
    found = complaint({"class_path": f"{__name__}.Wrapped", "init_args": {"judge": inner}}, Wrapped)
    assert (found.path, found.expected, found.given) == (("x", "judge", "threshold"), ("<class 'float'>",), "high")
    found = complaint(f"{__name__}.Jugde", Judge | None)
    assert (found.class_path, found.no_import) == (f"{__name__}.Jugde", True)
    found = complaint(f"{__name__}.Jugde", Callable[[int], Judge])
    assert (found.class_path, found.no_import) == (f"{__name__}.Jugde", True)
    found = complaint("four", int | None)
    assert (found.path, found.expected, found.given) == (("x",), ("<class 'int'>", "<class 'NoneType'>"), "four")
    found = complaint("drgrpo", Literal["grpo", "dr_grpo"])
    assert found.expected == ("typing.Literal['grpo', 'dr_grpo']",)
