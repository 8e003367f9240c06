"""The page on comparing methods: its suite can be meant, and it names every key that a suite has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from peftkit_bench.spec import SuiteError
from peftkit_bench.suite import Suite, parse

PAGE = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
SUITES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("text", SUITES)
def test_suite_of_the_page_can_be_meant(text):
    found = yaml.safe_load(text)
    assert set(parse(found).contenders) == set(found["contenders"])
    with pytest.raises(SuiteError, match="unknown key 'budget'"):
        parse({**found, "budget": 1})


def test_page_shows_a_suite_and_names_every_key_of_one():
    assert SUITES
    table = PAGE[PAGE.index("| key | what it says |") :].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines()[2:])))
    assert named == {field.name for field in dataclasses.fields(Suite)}
