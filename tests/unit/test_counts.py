"""What other systems' limits mean: the table in the code is the contract's, and the page shows the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from retrykit import RetryTemplate, SimpleRetryPolicy
from retrykit.counts import SYSTEMS, max_attempts_of

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "counts.md"
TABLE = [
    ("spring", 1, 1),
    ("spring", 3, 3),
    ("nameko", 1, 2),
    ("nameko", 3, 4),
    ("nameko", 0, None),
    ("zato-invoke", 1, 1),
    ("zato-invoke", 3, 3),
    ("zato-async-fallback", 1, 2),
    ("zato-async-fallback", 3, 4),
    ("zato-invoke-async", 1, 1),
    ("zato-invoke-async", 3, 3),
    ("pretry", 1, 1),
    ("pretry", 3, 3),
]


@pytest.mark.parametrize(("system", "limit", "attempts"), TABLE)
def test_a_limit_of_another_system_is_told_in_attempts(system, limit, attempts):
    assert max_attempts_of(system, limit) == attempts


def test_every_system_is_in_the_table_of_this_test():
    assert {system for system, _, _ in TABLE} == set(SYSTEMS)


@pytest.mark.parametrize(("system", "limit", "attempts"), [row for row in TABLE if row[2] is not None])
def test_a_policy_with_that_limit_makes_that_many_attempts(system, limit, attempts):
    made = []
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(max_attempts_of(system, limit)))

    def fails(context):
        made.append(context.attempt)
        raise ConnectionError("no")

    with pytest.raises(ConnectionError, match="no"):
        template.execute(fails)
    assert len(made) == attempts


@pytest.mark.parametrize("system", [system for system in SYSTEMS if system != "nameko"])
def test_zero_is_no_limit_only_where_the_system_says_so(system):
    with pytest.raises(ValueError, match=f"limit: must be at least 1 for '{system}', not 0"):
        max_attempts_of(system, 0)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_negative_limit_is_refused(system):
    with pytest.raises(ValueError, match=r"limit: must be at least . for .*, not -1"):
        max_attempts_of(system, -1)


def test_an_unknown_system_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"system: must be one of 'spring', 'nameko', .*, not 'Spring'"):
        max_attempts_of("Spring", 3)


@pytest.mark.parametrize("limit", [True, 3.0, "3", None])
def test_a_limit_that_is_no_whole_number_is_refused(limit):
    with pytest.raises(TypeError, match="limit: must be an int, not"):
        max_attempts_of("spring", limit)


def test_a_system_that_is_no_text_is_refused():
    with pytest.raises(TypeError, match="system: must be a str, not int 1"):
        max_attempts_of(1, 3)


def test_the_page_names_every_system_with_what_the_code_answers():
    rows = re.findall(r"^\| `(\S+)` \|.*\| `([^`]+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [system for system, _ in rows] == list(SYSTEMS)
    for system, formula in rows:
        for limit in (1, 2, 7):
            assert max_attempts_of(system, limit) == {"n": limit, "n + 1": limit + 1, "1 + n": 1 + limit}[formula]
