"""Pipelines of all families run, share forwards, are stored, cancelled and replayed.

A page of `tests/families` declares a family. A few classes run with the other tests; `make
test-families` runs all of them.
"""

import pytest
from families import load_families
from families.checks import check_class, one_thread

CLASSES = [
    pytest.param(
        family,
        name,
        id=name,
        marks=() if name in family.quick else pytest.mark.families,
    )
    for family in load_families()
    for name in family.classes
]


@pytest.mark.parametrize(("family", "name"), CLASSES)
def test_a_class(family, name):
    if family.why_missing(name):
        pytest.skip(family.why_missing(name))
    with one_thread():
        outcomes = check_class(family, name)
    failed = {check: outcome.reason for check, outcome in outcomes.items() if outcome.failed}
    assert not failed, "\n".join(f"{check}: {reason}" for check, reason in failed.items())
