"""Numbers are compared as people would by eye, and never taken for one another."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nspo_lightning.evaluation.answers import matches
from nspo_lightning.evaluation.numbers import as_number, numbers_in

SAME = [
    ("29", "$29.00"),
    ("72", "72.0"),
    ("1234", "1,234"),
    ("1,234.5", "€1234.50"),
    ("1234567", "1{,}234{,}567"),
    ("29", "US$29"),
    ("29", "It costs 29€."),
    ("5", "+5"),
    ("-5", "\N{MINUS SIGN}5"),
    ("-5", "$-5"),
    ("-5", "a loss of -$5.00"),
    ("5", "- 5 apples"),
    ("50", "50%"),
    ("50%", "50"),
    ("50%", "50 percent"),
    ("0.5", "50 %"),
    ("50\\%", "0.5"),
    ("1/2", "0.5"),
    ("0.5", "\\frac{1}{2}"),
    ("1.5", "1½"),
    ("3/2", "1 1/2"),
    ("3-5", "between 3 and 5"),
    ("3 to 5", "3\N{EN DASH}5 days"),
    ("$3 - $5", "3-5"),
    ("5%-10%", "5-10%"),
    ("3.5-4.5", "It is 3.5 to 4.5."),
    ("$10.50-$12.00", "between 10.5 and 12"),
    ("10.5 - 11", "So 10.5-11"),
    ("0.5-1", "0.5\N{EN DASH}1 kg"),
    ("1.5/2", "0.75"),
    ("100000", "1e5"),
    ("8", "10-2=8"),
    ("18", "The ducks lay 16, so she earns **$18** every day."),
    ("72", "The answer is 72. That took 2 steps."),
    ("72", "I buy 3 shirts. They cost 24 each.\nSo I pay 72."),
    ("7", "The answer is 3 + 4 = 7."),
    ("72", "**Answer:** 72\nStep 2 of 2 was the hard one."),
    ("1.5", "The answer is: $1.50! Shall I show 2 more?"),
    ("7", "I don't know what the answer is. Perhaps 7"),
    ("-3", "minus 3"),
    ("-3", "It is negative 3."),
    ("7", "10 minus 3 is 7"),
    ("3", "10 minus 3"),
    ("1000000", "1\N{THIN SPACE}000\N{THIN SPACE}000"),
    ("1500000", "$1.5 million"),
    ("2 thousand", "2,000"),
    ("7", "On 2024-01-05 at 3:30 it was 7, says version 1.2.3."),
]
DIFFERENT = [
    ("3", "13"),
    ("13", "3"),
    ("3", "3.1"),
    ("5", "0.5"),
    ("0.5", "5"),
    ("5", "-5"),
    ("50", "0.5"),
    ("0.5", "50"),
    ("0.5%", "50%"),
    ("5", "3-5"),
    ("3-5", "5"),
    ("3-5", "4-5"),
    ("5-3", "3-5"),
    ("1234", "1.234"),
    ("234", "1,234"),
    ("1/3", "0.33"),
    ("30", "at 3:30"),
    ("5", "2024-01-5"),
    ("4", "version 1.2.3-4"),
    ("10", "from 10-11.12.2024"),
    ("3.5-4.5", "3.5-4.6"),
    ("4.5", "3.5-4.5"),
    ("2", "B2"),
    ("29", "29 shirts in 3 boxes"),
    ("29", ""),
    ("29", "twenty"),
    ("72", "The answer is 2. 36 + 36 = 72 is not asked."),
    ("1.5", "1.5 million"),
    ("3", "minus 3"),
]


@pytest.mark.parametrize(("reference", "said"), SAME)
def test_the_same_to_the_eye(reference, said):
    assert matches(said, reference)


@pytest.mark.parametrize(("reference", "said"), DIFFERENT)
def test_not_the_same(reference, said):
    assert not matches(said, reference)


DECIMALS = st.decimals(min_value=-(10**9), max_value=10**9, places=2)


def spellings(number: Decimal) -> list[str]:
    """Write a number in the ways that people do."""
    sign, size = ("-" if number < 0 else ""), abs(number)
    plain = f"{size:.2f}".rstrip("0").rstrip(".")
    return [
        *(f"{sign}{text}" for text in (plain, f"{size:.2f}", f"{size:.5f}", f"{size:,.2f}", f"${size:,.2f}")),
        f"${sign}{plain}",
        f"{sign}{plain}".replace("-", "\N{MINUS SIGN}"),
        f"So with 3 of 17 it is {sign}{plain}.",
        f"{sign}{Fraction(size).numerator}/{Fraction(size).denominator}",
    ]


@given(DECIMALS)
def test_every_spelling_of_a_number_is_that_number(number):
    written = spellings(number)
    for reference in written[:7]:
        for said in written:
            assert matches(said, reference), (said, reference)


@given(DECIMALS, DECIMALS)
def test_other_numbers_are_others(one, other):
    for reference in spellings(one)[:7]:
        for said in spellings(other):
            assert matches(said, reference) == (one == other), (said, reference)


@given(DECIMALS)
def test_a_percent_sign_on_one_side_is_a_unit_and_on_both_counts(number):
    assert matches(f"{number}%", f"{number}")
    assert matches(f"{number}", f"{number} %")
    assert matches(f"{number}%", f"{number / 100}")
    assert matches(f"{number} percent", f"{number / 100}%") == (number == 0)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_ranges_have_two_ends(low, high):
    for said in (f"{low}-{high}", f"from {low:,} to {high:,}", f"between {low} and {high}"):
        assert matches(said, f"{low} to {high}")
        assert not matches(said, f"{low} to {high + 1}")
    assert not matches(f"{low}-{high}", f"{high}")


@given(st.text(alphabet="0123456789.,/-+%$eE: \\{}frac½", max_size=60))
def test_no_text_is_too_odd(text):
    for said in numbers_in(text):
        assert 1 <= len(said) <= 2
    found = as_number(text)
    assert found is None or matches(text, text)


@pytest.mark.parametrize("piece", ["9", "1,", "1/", "1-", "1 ", "-", "1:", ",111", "$", "\\frac{", "1.", "1e"])
def test_a_long_loop_is_read_at_once(piece):
    assert not matches(piece * 20_000, "29")
