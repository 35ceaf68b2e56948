"""README.md and docs/: links, flags, names and commands are those of the code."""
import re
import shlex

import forked
import link_lines
import pytest
from conftest import ROOT, make_rows, tiny_model, write_jsonl

import train
from losses import LOSSES, hyperparameters
from model import save_model

PAGES = link_lines.PAGES
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS["README.md"]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
# Flags of other programs, which pages mention.
FOREIGN_FLAGS = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "learning_rate"}


def links():
    """(page, text, target) of every link that leads into this project."""
    found = []
    for page, text in TEXTS.items():
        for label, target in LINK.findall(text):
            if not target.startswith(("http://", "https://", "mailto:")):
                found.append((page, label, target))
    return found


def anchor_of(heading):
    """The anchor that GitHub makes of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def split_blocks(text):
    """(text outside of fenced blocks, [lines of a block])."""
    outside, blocks, inside = [], [], False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
            if inside:
                blocks.append([])
        elif inside:
            blocks[-1].append(line)
        else:
            outside.append(line)
    return "\n".join(outside), blocks


def anchors(path):
    outside, _ = split_blocks(path.read_text(encoding="utf-8"))
    headings = re.findall(r"(?m)^#+ (.*)$", outside)
    return {anchor_of(heading) for heading in headings}


def test_the_readme_has_at_most_2200_words():
    assert len(README.split()) <= 2200


def test_every_link_leads_to_a_file_and_a_heading_that_exist():
    broken = []
    for page, _, target in links():
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists():
            broken.append((page, target))
        elif path.suffix == ".md" and anchor and anchor not in anchors(path):
            broken.append((page, target))
    assert broken == []


def test_every_link_to_a_line_of_code_leads_to_the_definition_of_the_name_in_its_text():
    found = re.findall(r"\.py#L\d+\)", README)
    assert len(found) == len(link_lines.CODE_LINK.findall(README)) >= 8
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        assert link_lines.correct(text, path.parent) == text, "run python tests/link_lines.py"


def test_every_page_of_docs_has_a_link_from_the_readme():
    linked = {target.partition("#")[0] for page, _, target in links() if page == "README.md"}
    assert {name for name in TEXTS if name.startswith("docs/")} <= linked


def test_the_readme_lists_every_loss_once():
    table = README.split("## The losses")[1].split("\n\n")[1]
    names = re.findall(r"`(\w+)`", table)
    real = {function.__name__ for function in LOSSES.values()}
    assert sorted(names) == sorted(real)


def test_the_page_of_the_code_lists_every_file_of_the_root_once():
    listed = re.findall(r"(?m)^\| `(\w+\.py)` \|", TEXTS["docs/code.md"])
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("*.py"))


def test_every_flag_that_a_page_names_is_a_flag_of_a_script():
    flags = set(FOREIGN_FLAGS)
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        flags |= set(re.findall(r'"(?:--)?(\w+)"', path.read_text()))
    for function in LOSSES.values():
        flags |= set(hyperparameters(function))
    unknown = []
    for page, text in TEXTS.items():
        for name in re.findall(r"(?<![\w-])--(\w\w+)", text):
            if name not in flags:
                unknown.append((page, name))
    assert unknown == []


# --- Commands -------------------------------------------------------------------------------------

def commands(page):
    """The commands of a page that run a script, without comments, as lists of words."""
    found = []
    for block in split_blocks(TEXTS[page])[1]:
        for line in "\n".join(block).replace("\\\n", " ").splitlines():
            if re.match(r"(\$ )?(python|torchrun) ", line):
                found.append(shlex.split(line.removeprefix("$ "), comments=True))
    return found


@pytest.fixture(scope="module")
def desk(tokenizer, tmp_path_factory):
    """A folder with the model org/base and pairs.jsonl, which the README's commands name."""
    path = tmp_path_factory.mktemp("desk")
    model = tiny_model("llama", tokenizer)
    model.config.max_position_embeddings = 1024
    save_model(model, tokenizer, path / "org/base")
    write_jsonl(path / "pairs.jsonl", make_rows(24))
    return path


def run_command(words, cwd):
    """Run a command of a page in forked processes, with torchrun's ranks at most 2."""
    ranks = 2 if words[0] == "torchrun" else 1
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    more = ["--max_new_tokens", "8"] if words[start] == "sample.py" else []
    return forked.run(words[start], *words[start + 1:], *more, ranks=ranks, cwd=cwd)


def test_the_commands_of_the_readme_for_your_own_data_run_as_written(desk):
    found = [words for words in commands("README.md") if "--model" in words]
    assert len(found) >= 5
    for words in found:
        result = run_command(words, desk)
        assert result.returncode == 0, (words, result.stdout[-2000:], result.stderr[-2000:])


@pytest.mark.parametrize("page", list(TEXTS))
def test_every_script_that_a_page_runs_exists(page):
    for words in commands(page):
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).exists(), words


@pytest.mark.parametrize("page", list(TEXTS))
def test_the_flags_of_every_training_command_of_a_page_go_together(page):
    """Commands that continue or evaluate a run need its folder; test_longer.py and test_trained.py
    run such commands."""
    for words in commands(page):
        if "train.py" in words and not {"--resume", "--eval_only", "..."}.intersection(words):
            train.parse_args(words[words.index("train.py") + 1:])
