"""jsonargparse's message about a union still has the form that `told_reason` reads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from nspo_lightning.compat.jsonargparse import told_reason


@dataclass
class Even:
    number: int = 2


def test_the_reason_is_found_in_the_message() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=int | Even)
    with pytest.raises(ArgumentError) as caught:
        parser.parse_args(['--x={"number": "odd"}'])
    text = str(caught.value)
    start = text.find("Does not validate against any of the Union subtypes")
    assert start >= 0, "see raise_union_unexpected_value in jsonargparse/_typehints.py for the new words"
    reason = told_reason(text[start:])
    assert "number" in reason, reason
    assert "Subtypes:" not in reason, reason
    assert "Given value" not in reason, reason


def test_other_messages_stay() -> None:
    assert told_reason("`group_size` must be at least 2, got 1.") == "`group_size` must be at least 2, got 1."
