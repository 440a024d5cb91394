"""jsonargparse's message about a union still has the form that `told_reason` reads."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser

from nspo_lightning.compat.jsonargparse import told_reason


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
