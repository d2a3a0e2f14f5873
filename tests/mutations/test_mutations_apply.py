"""The table of mutations follows the code: every change can be made. None is, that is `make mutations`."""

from __future__ import annotations

from mutation import ROOT, mutated
from table import MUTATIONS


def test_every_text_occurs_once_and_every_mutation_changes_its_file():
    problems = []
    for mutation in MUTATIONS:
        try:
            same = mutated(mutation, ROOT) == (ROOT / mutation.file).read_text()
        except (ValueError, SyntaxError) as error:
            problems.append(str(error))
        else:
            problems += [f"{mutation.mechanism}, {mutation.what}: changes nothing"] * same
    assert not problems, "\n".join(problems)


def test_every_test_that_is_to_notice_is_there():
    named = {test.partition("::")[0] for mutation in MUTATIONS for test in mutation.tests}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
