"""docs/conformance.md agrees with other implementations, and with what it says about them."""
import conformance
import pytest
from conftest import ROOT


@pytest.mark.parametrize("case", conformance.list_cases(), ids=lambda case: f"{case[3]} {case[0]}")
def test_a_difference_from_another_project_is_rounding_or_has_a_reason(case):
    row, _, _, project, _ = case
    if not conformance.is_installed(project):
        pytest.skip(f"{project} is not installed")
    is_different = conformance.difference(case) > conformance.ROUNDING
    assert is_different == ((row, project) in conformance.REASONS)


def read_page():
    """{(row, project): number} of the table in docs/conformance.md."""
    cells = {}
    lines = (ROOT / "docs" / "conformance.md").read_text().splitlines()
    head, _, *rows = [line.strip("| ").split("|") for line in lines if line.startswith("|")]
    projects = [name.strip().rpartition(" ")[0] for name in head[1:]]
    for name, *values in rows:
        for project, value in zip(projects, values):
            if value.strip():
                cells[name.strip(), project] = float(value)
    return cells


def test_the_page_has_every_comparison_and_no_difference_without_a_reason():
    page = read_page()
    assert page.keys() == {(case[0], case[3]) for case in conformance.list_cases()}
    different = {key for key, value in page.items() if value > conformance.ROUNDING}
    assert different == set(conformance.REASONS)
