"""Correct the line numbers of links from README.md and docs/ into the code.

    python tests/link_lines.py

A link such as [`dpo.rewards`](dpo.py#L178) leads to the line that defines the name at its end: a
function, a class, or the first assignment.
"""
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CODE_LINK = re.compile(r"(\[[^\]]*`(?:\w+\.)?(\w+)`\]\()([\w./]+\.py)#L\d+\)")


def line_of(path: pathlib.Path, name: str) -> int:
    """The number of the line that defines the name, from 1."""
    definition = re.compile(rf"\s*(def|class) {name}\b|\s*{name}\s+=|{name} =")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if definition.match(line):
            return number
    raise LookupError(f"{path} defines no {name}")


def correct(text: str, folder: pathlib.Path) -> str:
    """The text of a page in this folder with the right line numbers."""
    def right(match):
        start, name, target = match.groups()
        return f"{start}{target}#L{line_of(folder / target, name)})"

    return CODE_LINK.sub(right, text)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(correct(text, page.parent), encoding="utf-8")
