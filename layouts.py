"""Reads rows of any common layout as one: a prompt, its answers, and what is known of them.

    trl               prompt, chosen, rejected: texts or messages; the prompt may be inside both
    hh                chosen, rejected: texts with "\\n\\nHuman:" and "\\n\\nAssistant:"
    sharegpt          conversations of from and value; chosen, rejected
    alpaca            instruction, input, history; chosen, rejected, or output: a list of two
    kto               prompt, completion, label; messages and a label
    ranked            prompt, responses from best to worst
    scored            responses with scores, ratings or ranks
    labelled_pair     two answers, and a column that says which one is better
    openai            input.messages, preferred_output, non_preferred_output
    orca              system, question, chosen, rejected
    several_rejected  prompt, chosen, rejected: a list of answers

`examples` finds the layout by the fields of the first row, and every row of a file must have the
layout of the first. formats.py has a small function for each form of a layout, with fields.py it
reads the columns, conversations.py separates prompt and answers, selection.py chooses the answers
that the loss needs, and unread.py lists the columns that nothing reads.
"""
import json
from collections.abc import Iterator

import datasets

from conversations import TURN, beginning, split_row
from errors import UserError, nearest, printable
from fields import Fields, quote_names, without_nulls
from formats import BOTH, HAVE_VERDICTS, LAYOUTS, SCORES, Form, trl_forms
from images import COLUMNS, place_pictures, read_pictures
from registry import Needs
from selection import Shape, choose_answers
from sources import Source, kind_of_split, read_rows
from unread import list_unread, texts_of


def known_names() -> tuple:
    """List the names that --columns may give to a column."""
    names = dict.fromkeys(("prompt", *BOTH, *SCORES, "id", "weight", "tools", *COLUMNS))
    for forms in LAYOUTS.values():
        for form in forms:
            names |= dict.fromkeys(form.fields + form.more)
    return tuple(names)


# --- The layout of a file -------------------------------------------------------------------------

def forms_of(layout, needs):
    return trl_forms(needs) if layout == "trl" else LAYOUTS[layout]


def find_form(layout, values, needs, must_check=True):
    """Return the first form of a layout that a row may have, or None."""
    for form in forms_of(layout, needs):
        is_ok = form.check is None or not must_check
        if values.keys() >= set(form.fields) and (is_ok or form.check(values)):
            return form
    return None


def find_forms(values, needs):
    """Return {layout: form} of the layouts that a row may have. A form with more fields, or of the
    same fields with a check of their values, is taken before another one."""
    forms = {}
    for layout in LAYOUTS:
        form = find_form(layout, values, needs)
        if form:
            forms[layout] = form
    return {layout: form for layout, form in forms.items() if not is_covered(form, forms.values())}


def is_covered(form, others):
    for other in others:
        fields, more = set(form.fields), set(other.fields)
        if fields < more or (fields == more and other.check and not form.check):
            return True
    return False


def choose_form(row: Fields, needs: Needs, layout: str) -> tuple[str, Form]:
    """Choose the layout of a file by its first row. Returns (layout, form)."""
    if layout not in ("auto", *LAYOUTS):
        raise UserError(f"{row.where}: --layout {layout}: there is no such layout; there are auto, "
                        f"{', '.join(LAYOUTS)}{nearest(layout, LAYOUTS)}")
    if layout != "auto":
        form = find_form(layout, row.values, needs) or find_form(layout, row.values, needs, False)
        if form is None:
            raise UserError(describe_missing(row, needs, layout))
        return layout, form
    values = {name: value for name, value in row.values.items()
              if row.name_of_file(name) not in row.ignored}
    forms = find_forms(values, needs)
    if len(forms) > 1:
        kinds = [f"{name} ({', '.join(form.fields)})" for name, form in forms.items()]
        raise UserError(f"{row.where}: may be of the layout {' or '.join(kinds)}; pass --layout "
                        f"{' or --layout '.join(forms)}")
    for name, form in forms.items():
        return name, form
    sides = needs.answers or BOTH
    raise UserError(f"{row.where}: needs the fields {', '.join(('prompt', *sides))}, or chosen and "
                    "rejected with the prompt inside both (--columns renames other fields); it has "
                    f"{quote_names(sorted(row.values))}{nearest_layout(row.values)}")


def describe_missing(row, needs, layout):
    """Say which fields the layout of --layout needs and the row lacks."""
    # The form with the most fields that are there.
    fields = max((form.fields for form in forms_of(layout, needs)),
                 key=lambda fields: len(row.values.keys() & set(fields)) / len(fields))
    lacking = [name for name in fields if name not in row.values]
    forms = find_forms(row.values, needs)
    other = f"; it may be of the layout {' or '.join(forms)}" if forms else ""
    if not forms:
        other = nearest_layout(row.values)
    if row.theirs and find_form(layout, row.of_file, needs):
        other = "; leave --columns out, which renames them"
    return (f"{row.where}: --layout {layout} needs the fields {', '.join(fields)}; the row lacks "
            f"{quote_names(lacking)} and has {quote_names(sorted(row.values))}{other}")


def nearest_layout(values):
    """Name the layout of which a row has at least half of the fields, for the end of an error."""
    share, near = 0.0, ""
    for layout, forms in LAYOUTS.items():
        for form in forms:
            lacking = [name for name in form.fields if name not in values]
            here = 1 - len(lacking) / len(form.fields)
            if lacking and here >= 0.5 and here > share:
                share = here
                near = f"; the nearest layout is {layout}, without {quote_names(lacking)}"
    return near


def find_layout(source: Source, needs: Needs, shape: Shape) -> str:
    """Return the name of the layout of the first row of a source."""
    for where, row, _ in read_rows(Source(*source)):
        fields = Fields(row, where, shape.columns, shape.ignored, shape.images)
        return choose_form(fields, Needs(*needs), shape.layout)[0]
    raise UserError(f"{source[0]}: there is no row in it")


def layouts_that_read(name: str, row: Fields) -> str:
    """Say which layout reads a column, or "". name: of the file."""
    forms = find_forms(row.of_file, Needs())
    for layout, form in forms.items():
        if name in form.fields + form.more:
            without = " without --columns" if row.theirs else ""
            return f"--layout {layout}{without} reads it"
    layouts = []
    for layout, forms in LAYOUTS.items():
        if any(name in form.fields + form.more for form in forms):
            layouts.append(layout)
    if not layouts:
        return ""
    words = "the layout {} reads" if len(layouts) == 1 else "the layouts {} read"
    return words.format(", ".join(layouts)) + " a column of this name"


# --- The rows of a file ---------------------------------------------------------------------------

def examples(source: Source, needs: Needs, shape: Shape, **cache_key) -> Iterator[dict]:
    """Yield the examples of every row: {id, chat, has_own_prompt, prompt, answers, ranks, scores,
    labels, weight, options, image_paths, image_bytes, notes, problem, unread}.

    chat            whether prompt and answers are JSON of messages instead of text
    has_own_prompt  whether the prompt is a field of the row, or is searched inside the answers
    answers         best first, if their order is known; ranks, scores: one for each
    labels          for a loss of labels: one bool
    options         JSON of what the chat template gets with the messages
    image_paths     of the images of the prompt, "" where image_bytes has the image itself
    notes           reasons for the report; problem: why the row has to be dropped
    unread          a JSON list of the columns and message keys that are not read
    cache_key       unused here; `datasets` hashes it with the other arguments
    """
    source, needs, shape = Source(*source), Needs(*needs), Shape(*shape)
    layout = form = file_is_chat = None
    splits = set()
    for where, row_of_file, folder in read_rows(source):
        row = Fields(row_of_file, where, shape.columns, shape.ignored, shape.images)
        # Every row of a file must have the layout of the first.
        if form is None:
            layout, form = choose_form(row, needs, shape.layout)
        known = form.read(row, needs)
        if known.prompt is None and "prompt" not in form.fields and row.has("prompt"):
            raise UserError(f"{where}: has a prompt, and the first row of its file had none; "
                            "give every row a prompt, or none")
        names = known.names or [f"answer {i + 1}" for i in range(len(known.answers))]
        prompt, answers = split_row(known.prompt, dict(zip(names, known.answers)), where)
        is_chat = not isinstance(prompt, str)
        pictures = read_pictures(row, folder) if shape.images else []
        if shape.images and is_chat:
            prompt, pictures = place_pictures(prompt, answers, pictures, row, folder)
        if file_is_chat not in (None, is_chat):
            kind, earlier = ("a list of messages", "text") if is_chat else ("text", "messages")
            raise UserError(f"{where}: the row is {kind}, but earlier rows are {earlier}; write "
                            "all rows of the file in one form")
        file_is_chat = is_chat

        common = {
            "chat": is_chat,
            "has_own_prompt": known.prompt is not None,
            "prompt": json.dumps(prompt) if is_chat else prompt,
            "weight": weight_of(row),
            "options": read_options(row, known, is_chat),
            "image_paths": [picture.path for picture in pictures],
            "image_bytes": [picture.content for picture in pictures],
        }
        common["unread"] = json.dumps(unread_of(row, known, layout))
        check_one_split(row, splits)
        written = [json.dumps(answer) if is_chat else answer for answer in answers]
        for choice in choose_answers(known, needs, shape, where):
            yield make_example(row, known, choice, written, needs, layout) | common


def example_features() -> datasets.Features:
    """Return the types of the columns of `examples`: `datasets` would take them from the first
    thousand rows, where every list may be empty."""
    types = dict.fromkeys(("id", "prompt", "options", "problem", "unread"), "string")
    types |= {"chat": "bool", "has_own_prompt": "bool", "weight": "float64"}
    features = {name: datasets.Value(kind) for name, kind in types.items()}
    lists = {"answers": "string", "ranks": "int64", "scores": "float64", "labels": "bool",
             "notes": "string", "image_paths": "string", "image_bytes": "large_binary"}
    for name, kind in lists.items():
        features[name] = datasets.Sequence(datasets.Value(kind))
    return datasets.Features(features)


def make_example(row, known, choice, written, needs, layout):
    """Make what is different in the examples of one row."""
    scores, ranks = [], [0] * len(choice.answers)
    if needs.scores:
        if not known.scores:
            raise UserError(f"{row.where}: the loss reads a score of each answer, and this row of "
                            f"the layout {layout} has none; the layout scored reads them")
        scores = [float(known.scores[index]) for index in choice.answers]
    if known.ranks:
        ranks = [known.ranks[index] for index in choice.answers]
        places = sorted(set(ranks))
        ranks = [places.index(rank) for rank in ranks]
    return {
        "id": name_row(row) + choice.suffix,
        "answers": [written[index] for index in choice.answers],
        "ranks": ranks,
        "scores": scores,
        "labels": choice.labels,
        "notes": [*choice.notes, *sorted(row.notes)],
        "problem": known.problem or choice.problem,
    }


def weight_of(row):
    """Read the weight of a row in the loss: 1 where there is no such column."""
    if not row.has("weight"):
        return 1.0
    weight = row.number("weight")
    if weight < 0:
        raise UserError(f"{row.where}: the field 'weight' holds {weight:g}; a weight is at least 0")
    return weight


def read_options(row, known, is_chat):
    """Return JSON of what the chat template gets with the messages: the tools."""
    options = dict(known.options)
    if row.has("tools"):
        options["tools"] = row.list("tools")
    if row.adds_nulls:
        options = without_nulls(options)
    if options and not is_chat:
        raise UserError(f"{row.where}: the column 'tools' is not read: only a chat template writes "
                        "tools, and the prompt and the answers are text; write them as messages; "
                        "--ignore_columns tools trains without it")
    return json.dumps(options) if options else ""


def unread_of(row, known, layout):
    """List the columns and the keys of messages that are not read."""
    if row.name_of_file("id") in row.of_file:
        row.read.add(row.name_of_file("id"))
    first = known.prompt if known.prompt is not None else known.answers[0]
    needs_prompt = known.prompt is None and not holds_prompt(first)
    columns = list_unread(
        row.of_file, row.read, row.ignored, texts_of(first), needs_prompt,
        layout in HAVE_VERDICTS, lambda name: layouts_that_read(name, row), row.where)
    return columns + list(row.unread_keys)


def holds_prompt(dialogue):
    """Return whether an answer marks the end of the prompt inside it."""
    if isinstance(dialogue, str):
        return TURN in dialogue
    return dialogue[0]["role"] != "assistant"


def check_one_split(row, splits):
    """Raise if the rows of a file name two splits. splits: those of the rows before, changed."""
    if "split" in row.of_file and "split" not in row.read and "split" not in row.ignored:
        splits.add(kind_of_split(str(row.of_file["split"])))
    if len(splits - {None}) > 1:
        raise UserError(f"{row.where}: its column 'split' has {row.of_file['split']!r}, and an "
                        "earlier row has another split; write each split to a file of its own; "
                        "--ignore_columns split reads all rows")


def name_row(row):
    """Return the name of a row in errors and logs: file and number, and its id if it has one."""
    row_id = row.values.get("id")
    if row_id is None:
        return row.where
    text = beginning(row_id) if isinstance(row_id, (list, dict)) else str(row_id)[:200]
    return f"{row.where} (id {printable(text)})"
