"""Names that other projects use for a setting of ours are told of, not passed over."""

import re

import pytest

from lever_plus.settings import names


@pytest.mark.parametrize("name", sorted(names.ELSEWHERE))
def test_a_name_of_another_project_says_what_it_is_here(name: str) -> None:
    known = names.known()
    assert name not in known and set(re.findall(r"[A-Z_0-9]{3,}", names.ELSEWHERE[name])) <= known
    told = names.lines(known, {name: "5"}, {})
    assert len(told) == 1 and names.ELSEWHERE[name] in told[0]
    assert names.lines(known, {name: ""}, {}) == []
