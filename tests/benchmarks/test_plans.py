import pytest

from benchmarks.plans import DOCUMENT, Planned, planned, rewritten


@pytest.mark.slow
def test_the_plans_of_the_documentation_are_those_of_the_program():
    document, blocks = DOCUMENT.read_text(encoding="utf-8"), list(planned())
    assert len(blocks) == document.count("```text\n") == 12
    assert rewritten(document, blocks) == document


def test_only_the_block_behind_a_heading_is_written_anew(monkeypatch):
    monkeypatch.setattr("benchmarks.plans.block", lambda each: f"{each.arguments}")
    document = "**a**\n\n```text\nold\n```\n\n**b**\n\n```text\nkept\n```\n"
    found = rewritten(document, [Planned("**a**", ("plan",), None)])
    assert found == document.replace("old", "('plan',)")
    for heading in ("**c**", "kept"):
        with pytest.raises(ValueError, match="no block behind"):
            rewritten(document, [Planned(heading, ("plan",), None)])
