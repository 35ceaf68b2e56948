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

Each layout has a small function for each form of its rows. `examples` finds the layout by the
fields of the first row, and every row of a file must have the layout of the first. fields.py reads
the columns, conversations.py separates prompt and answers, selection.py chooses the answers that
the loss needs, and unread.py lists the columns that nothing reads.
"""
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from conversations import (
    TURN,
    as_messages,
    beginning,
    parse_messages,
    split_row,
    with_system,
)
from errors import UserError, nearest, printable
from fields import Fields, parse_literal, quote_names, without_nulls
from registry import Needs
from selection import Row, Shape, choose_answers
from sources import Source, kind_of_split, read_rows
from unread import list_unread, texts_of

BOTH = ("chosen", "rejected")


class Form(NamedTuple):
    """One form of the rows of a layout."""
    fields: tuple  # the columns that a row must have
    read: Callable  # (Fields, Needs) -> Row
    more: tuple = ()  # the columns that are read if they are there
    check: Callable | None = None  # whether the values of a row may be of this form


# --- Pairs with a better and a worse answer -------------------------------------------------------

def pair_row(row, needs, prompt, chosen, rejected, options=None):
    """Make the Row of a pair. The scores are columns of their own in every layout."""
    scores = []
    if needs.scores:
        scores = [row.score("chosen_score"), row.score("rejected_score")]
    return Row(prompt, [chosen, rejected], ranks=[0, 1], scores=scores, names=BOTH,
               options=options or {})


def read_trl(fields, row, needs):
    """prompt, chosen, rejected. A loss of one answer reads one of them alone."""
    names = [name for name in fields if name != "prompt"]
    prompt = row.dialogue("prompt") if "prompt" in fields else None
    answers = [row.dialogue(name) for name in names]
    scores = []
    if needs.scores:
        for name in names:
            is_needed = name in (needs.answers or BOTH)
            scores.append(row.score(f"{name}_score") if is_needed else math.nan)
    return Row(prompt, answers, ranks=list(range(len(names))), scores=scores, names=tuple(names))


def trl_forms(needs):
    """A loss of one answer reads both where the prompt has to be searched inside them."""
    sides = needs.answers or BOTH
    forms = []
    for fields in (("prompt", *sides), sides, BOTH):
        # One answer without a prompt must be a dialogue: a text does not mark where the answer
        # begins.
        check = functools.partial(is_dialogue, fields[0]) if len(fields) == 1 else None
        forms.append(Form(fields, functools.partial(read_trl, fields), check=check))
    return forms


def is_dialogue(name, values):
    value = values[name]
    if isinstance(value, str):
        value = parse_messages(value, name, "")
    return isinstance(value, list)


def has_turns(values):
    """Return whether both texts of HH-RLHF begin with the same turns."""
    texts = [values[name] for name in BOTH]
    is_text = all(isinstance(text, str) for text in texts)
    return is_text and TURN in os.path.commonprefix(texts)


def read_hh(row, needs):
    texts = [row.text(name) for name in BOTH]
    is_split = TURN in os.path.commonprefix(texts)
    problem = "" if is_split else "no turn of the assistant that both dialogues share"
    return pair_row(row, needs, None, *texts)._replace(problem=problem)


def read_sharegpt(row, needs):
    """LLaMA-Factory's format of ShareGPT: the conversation up to the answers."""
    prompt = with_system(row.messages("conversations"), row.text("system", ""), row.where)
    return pair_row(row, needs, prompt, *[row.dialogue(name) for name in BOTH])


def alpaca_prompt(row):
    """Make messages of instruction, input, history and system, as LLaMA-Factory does."""
    texts = [row.text("instruction", ""), row.text("input", "")]
    messages = []
    for turn in row.list("history") if row.has("history") else []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f"{row.where}: the field 'history' holds {beginning(turn)}; write each "
                            "turn as a list of a question and an answer")
        for role, text in zip(("user", "assistant"), turn):
            messages += as_messages(role, row.check_text(text, "history"))
    question = "\n".join(text for text in texts if text)
    messages += as_messages("user", question)
    return with_system(messages, row.text("system", ""), row.where)


def read_alpaca(row, needs):
    return pair_row(row, needs, alpaca_prompt(row), *[row.text(name) for name in BOTH])


def read_alpaca_output(row, needs):
    """The output is a list, from best to worst, or one text for supervised fine-tuning."""
    is_list = isinstance(row.value("output"), list)
    answers = row.dialogues("output") if is_list else [row.text("output")]
    return Row(alpaca_prompt(row), answers, ranks=list(range(len(answers))))


def is_alpaca(values):
    """Return whether a row with an instruction is of Alpaca, where it may also be a prompt under
    another name."""
    has_columns = not {"input", "history", "system"}.isdisjoint(values)
    return "prompt" not in values and (has_columns or isinstance(values.get("output"), list))


def has_system(values):
    return "system" in values and {"prompt", "instruction"}.isdisjoint(values)


def read_orca(name, row, needs):
    question = as_messages("user", row.text(name))
    prompt = with_system(question, row.text("system", ""), row.where)
    return pair_row(row, needs, prompt, *[row.text(side) for side in BOTH])


def read_openai(row, needs):
    """The preference files of OpenAI's fine-tuning."""
    given = row.dict("input")
    prompt = row.as_dialogue(given.get("messages"), "input.messages")
    answers = [row.dialogue(name) for name in ("preferred_output", "non_preferred_output")]
    options = {"tools": given["tools"]} if given.get("tools") else {}
    return pair_row(row, needs, prompt, *answers, options)


def lacks_prompt(values):
    return "prompt" not in values


# --- Several answers ------------------------------------------------------------------------------

def has_several_rejected(values):
    """Return whether rejected is a list of answers: a list of messages has no texts and lists."""
    rejected = values["rejected"]
    is_list = isinstance(rejected, list) and len(rejected) > 0
    is_chosen = isinstance(values["chosen"], str) or is_dialogue("chosen", values)
    return is_list and is_chosen and all(isinstance(item, (str, list)) for item in rejected)


def read_several_rejected(row, needs):
    """One chosen answer, and rejected ones without an order."""
    prompt = row.dialogue("prompt") if row.has("prompt") else None
    rejected = row.dialogues("rejected")
    scores = []
    if needs.scores:
        scores = [row.score("chosen_score"), *row.numbers("rejected_score", len(rejected))]
    ranks = [0] + [1] * len(rejected)
    return Row(prompt, [row.dialogue("chosen"), *rejected], ranks=ranks, scores=scores)


def ranks_of(scores):
    """Rank scores from 0 for the highest. Equal scores have equal ranks."""
    places = sorted(set(scores), reverse=True)
    return [places.index(score) for score in scores]


def read_ranked(row, needs):
    """Responses from best to worst, or with the numbers of `ranks`, of which the lowest is best."""
    answers = row.dialogues("responses")
    ranks = list(range(len(answers)))
    if row.has("ranks"):
        ranks = ranks_of([-rank for rank in row.numbers("ranks", len(answers))])
    return Row(row.dialogue("prompt"), answers, ranks=ranks)


def read_scored(prompt, answers, scores, row, needs):
    """Columns with a list of answers and a list of their scores."""
    texts = row.dialogues(answers)
    numbers = row.numbers(scores, len(texts))
    return Row(row.dialogue(prompt), texts, ranks=ranks_of(numbers), scores=numbers)


def scored_form(*names):
    return Form(names, functools.partial(read_scored, *names))


def read_ultrafeedback(prompt, row, needs):
    """UltraFeedback as it was made: completions of {response, overall_score}."""
    texts, scores = [], []
    for item in row.list("completions"):
        where = f"completions[{len(texts) + 1}]"
        if not isinstance(item, dict):
            raise UserError(f"{row.where}: the field '{where}' holds {beginning(item)}, which is "
                            "no completion with a score")
        texts.append(row.as_dialogue(item.get("response"), f"{where}.response"))
        scores.append(score_of_completion(item, where, row))
    return Row(row.dialogue(prompt), texts, ranks=ranks_of(scores), scores=scores)


def score_of_completion(item, where, row):
    """Read the overall score of a completion, or the mean of its ratings."""
    for name in ("overall_score", "fine-grained_score", "score"):
        if item.get(name) is not None:
            return row.as_number(item[name], f"{where}.{name}")
    ratings = []
    notes = item.get("annotations")
    for name, note in notes.items() if isinstance(notes, dict) else ():
        rating = note.get("Rating") if isinstance(note, dict) else note
        ratings.append(row.as_number(rating, f"{where}.annotations.{name}"))
    if not ratings:
        raise UserError(f"{row.where}: the field '{where}' has no overall_score and no ratings")
    return math.fsum(ratings) / len(ratings)


def read_nectar(row, needs):
    """Nectar: answers of {answer, rank}, of which the rank 1 is best."""
    texts, ranks = [], []
    for item in row.list("answers"):
        where = f"answers[{len(texts) + 1}]"
        if not isinstance(item, dict):
            raise UserError(f"{row.where}: the field '{where}' holds {beginning(item)}, which is "
                            "no answer with a rank")
        texts.append(row.as_dialogue(item.get("answer"), f"{where}.answer"))
        ranks.append(row.as_number(item.get("rank"), f"{where}.rank"))
    return Row(row.dialogue("prompt"), texts, ranks=ranks_of([-rank for rank in ranks]))


def holds_objects(name, key, values):
    """Return whether a column is a list of objects with a key."""
    items = parse_literal(values[name], name, "") if is_json(values[name]) else values[name]
    is_list = isinstance(items, list) and len(items) > 0
    return is_list and isinstance(items[0], dict) and key in items[0]


def is_json(value):
    try:
        parse_literal(value, "", "")
    except UserError:
        return False
    return isinstance(value, str)


# --- Answers with labels --------------------------------------------------------------------------

def read_kto(label, row, needs):
    """prompt, completion and a label. The prompt may be inside the completion."""
    prompt = row.dialogue("prompt") if row.has("prompt") else None
    return Row(prompt, [row.dialogue("completion")], labels=[row.label(label)],
               names=("completion",))


def read_kto_messages(messages, label, row, needs):
    """A dialogue and a label of its last answer."""
    dialogue = with_system(row.messages(messages), row.text("system", ""), row.where)
    return Row(None, [dialogue], labels=[row.label(label)], names=(messages,))


def read_kto_alpaca(row, needs):
    return Row(alpaca_prompt(row), [row.text("output")], labels=[row.label("kto_tag")])


# --- Two answers, and which one is better ---------------------------------------------------------

def two_answers(prompt, answers, verdict, scores=()):
    """Make the Row of two answers. verdict: below 0 the first is better, above 0 the second, and 0
    is a tie."""
    ranks = [int(verdict > 0), int(verdict < 0)]
    return Row(prompt, answers, ranks=ranks, scores=list(scores))


# The meaning of the number of the better answer, of SHP's label, and of a winner.
NUMBER_OF_BETTER = {"0": -1, "1": 1}
FIRST_IS_BETTER = {"1": -1, "0": 1, "true": -1, "false": 1}
WINNER = {
    "model_a": -1, "a": -1, "response_a": -1, "model_b": 1, "b": 1, "response_b": 1,
    "tie": 0, "tie (bothbad)": 0, "both_bad": 0, "bothbad": 0,
}


def read_safe_rlhf(verdict, row, needs):
    """PKU-SafeRLHF: the number of the better response."""
    answers = [row.dialogue("response_0"), row.dialogue("response_1")]
    return two_answers(row.dialogue("prompt"), answers, row.choice(verdict, NUMBER_OF_BETTER))


def read_shp(row, needs):
    """SHP: the label 1 says that the first comment is better. The scores are upvotes."""
    answers = [row.text("human_ref_A"), row.text("human_ref_B")]
    scores = []
    if needs.scores:
        scores = [row.score("score_A"), row.score("score_B")]
    verdict = row.choice("labels", FIRST_IS_BETTER)
    return two_answers(row.text("history"), answers, verdict, scores)


def read_helpsteer(prompt, first, second, verdict, row, needs):
    """HelpSteer: a preference from -3, the first is much better, to 3, the second is."""
    answers = [row.dialogue(first), row.dialogue(second)]
    return two_answers(row.dialogue(prompt), answers, row.number(verdict))


def read_arena(row, needs):
    """Chatbot Arena: two whole dialogues."""
    answers = [row.messages("conversation_a"), row.messages("conversation_b")]
    return two_answers(None, answers, row.choice("winner", WINNER))


def read_winner(row, needs):
    answers = [row.dialogue("response_a"), row.dialogue("response_b")]
    return two_answers(row.dialogue("prompt"), answers, row.choice("winner", WINNER))


def read_winner_flags(row, needs):
    """The Arena's files of turns: lists of texts, and a column of 0 and 1 for each result."""
    flags = [row.label(f"winner_model_{model}") for model in "ab"]
    if all(flags):
        raise UserError(f"{row.where}: has 1 in winner_model_a and in winner_model_b")
    dialogues = [arena_turns(row, f"response_{model}") for model in "ab"]
    if row.has("winner_tie"):
        row.value("winner_tie")
    return two_answers(None, dialogues, flags[1] - flags[0])


def arena_turns(row, name):
    """Make messages of the turns of the user and of one model."""
    users, models = row.list("prompt"), row.list(name)
    if len(users) != len(models):
        raise UserError(f"{row.where}: the field 'prompt' has {len(users)} turns and '{name}' "
                        f"{len(models)}; each turn has one answer")
    messages = []
    for user, answer in zip(users, models):
        messages += as_messages("user", row.check_text(user, "prompt"))
        messages += as_messages("assistant", row.check_text(answer, name))
    return messages


def read_webgpt(row, needs):
    """WebGPT: the answer with the higher score is better. The question may be an object."""
    question = parse_literal(row.value("question"), "question", row.where)
    if isinstance(question, dict):
        question = question.get("full_text")
    answers = [row.text("answer_0"), row.text("answer_1")]
    scores = [row.number("score_0"), row.number("score_1")]
    verdict = scores[1] - scores[0]
    return two_answers(row.check_text(question, "question"), answers, verdict, scores)


def read_summaries(row, needs):
    """Summarize from feedback: a post or an article, two summaries and the number of the better."""
    info = row.dict("info")
    lines = []
    for name, title in (("subreddit", "SUBREDDIT: r/"), ("title", "TITLE: "), ("post", "POST: "),
                        ("article", "ARTICLE: ")):
        if info.get(name):
            lines.append(title + row.check_text(info[name], f"info.{name}"))
    prompt = "\n\n".join([*lines, "TL;DR:"])
    texts = []
    for item in row.list("summaries"):
        text = item.get("text") if isinstance(item, dict) else item
        texts.append(row.check_text(text, f"summaries[{len(texts) + 1}].text"))
    if len(texts) != 2 or not lines:
        raise UserError(f"{row.where}: needs two summaries and a post or an article; it has "
                        f"{len(texts)} summaries of {quote_names(info)}")
    return two_answers(prompt, texts, row.choice("choice", NUMBER_OF_BETTER))


# --- The table ------------------------------------------------------------------------------------

SCORES = ("chosen_score", "rejected_score")
ALPACA = ("input", "history", "system")

LAYOUTS = {
    "trl": trl_forms(Needs()),
    "hh": [Form(BOTH, read_hh, SCORES, has_turns)],
    "sharegpt": [
        Form(("conversations", *BOTH), read_sharegpt, ("system", "tools", *SCORES), lacks_prompt),
    ],
    "alpaca": [
        Form(("instruction", *BOTH), read_alpaca, ALPACA + SCORES, is_alpaca),
        Form(("instruction", "output"), read_alpaca_output, ALPACA, is_alpaca),
    ],
    "kto": [
        Form(("prompt", "completion", "label"), functools.partial(read_kto, "label")),
        Form(("prompt", "completion", "kto_tag"), functools.partial(read_kto, "kto_tag")),
        Form(("completion", "label"), functools.partial(read_kto, "label")),
        Form(("instruction", "output", "kto_tag"), read_kto_alpaca, ALPACA),
    ],
    "ranked": [Form(("prompt", "responses"), read_ranked, ("ranks",))],
    "scored": [
        scored_form("prompt", "responses", "scores"),
        scored_form("prompt", "completions", "scores"),
        Form(("prompt", "answers"), read_nectar,
             check=functools.partial(holds_objects, "answers", "rank")),
    ],
    "labelled_pair": [
        Form(("history", "human_ref_A", "human_ref_B", "labels"), read_shp, ("score_A", "score_B")),
        Form(("conversation_a", "conversation_b", "winner"), read_arena),
        Form(("prompt", "response_a", "response_b", "winner"), read_winner),
        Form(("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
             read_winner_flags, ("winner_tie",)),
        Form(("question", "answer_0", "answer_1", "score_0", "score_1"), read_webgpt),
        Form(("info", "summaries", "choice"), read_summaries),
    ],
    "openai": [Form(("input", "preferred_output", "non_preferred_output"), read_openai)],
    "orca": [
        Form((name, *BOTH), functools.partial(read_orca, name), ("system", *SCORES), has_system)
        for name in ("question", "input")
    ],
    "several_rejected": [
        Form(("prompt", *BOTH), read_several_rejected, SCORES, has_several_rejected),
        Form(BOTH, read_several_rejected, SCORES, has_several_rejected),
    ],
}
for messages_name in ("messages", "conversations"):
    for label_name in ("kto_tag", "label"):
        read = functools.partial(read_kto_messages, messages_name, label_name)
        LAYOUTS["kto"].append(Form((messages_name, label_name), read, ("system", "tools")))
for prompt_name in ("instruction", "input", "prompt"):
    for scores_name in ("ratings", "rating"):
        LAYOUTS["scored"].append(scored_form(prompt_name, "generations", scores_name))
    LAYOUTS["scored"].append(Form(
        (prompt_name, "completions"), functools.partial(read_ultrafeedback, prompt_name),
        check=functools.partial(holds_objects, "completions", "response")))
for verdict_name in ("better_response_id", "safer_response_id"):
    LAYOUTS["labelled_pair"].append(Form(
        ("prompt", "response_0", "response_1", verdict_name),
        functools.partial(read_safe_rlhf, verdict_name)))
for names in (("context", "response1", "response2", "overall_preference"),
              ("prompt", "response_1", "response_2", "preference_strength")):
    LAYOUTS["labelled_pair"].append(Form(names, functools.partial(read_helpsteer, *names)))

# Layouts whose rows say themselves which answer is better.
HAVE_VERDICTS = ("kto", "scored", "labelled_pair")


def known_names() -> tuple:
    """List the names that --columns may give to a column."""
    names = {"id": True, "weight": True, "tools": True} | dict.fromkeys(SCORES)
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
        raise UserError(f"--layout {layout}: there is no such layout; there are auto, "
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
    for where, row in read_rows(Source(*source)):
        fields = Fields(row, where, shape.columns, shape.ignored)
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
    noun = "layout" if len(layouts) == 1 else "layouts"
    return f"the {noun} {', '.join(layouts)} read a column of this name" if layouts else ""


# --- The rows of a file ---------------------------------------------------------------------------

def examples(source: Source, needs: Needs, shape: Shape, **cache_key) -> Iterator[dict]:
    """Yield the examples of every row: {id, chat, has_own_prompt, prompt, answers, ranks, scores,
    labels, weight, options, notes, problem, unread}.

    chat            whether prompt and answers are JSON of messages instead of text
    has_own_prompt  whether the prompt is a field of the row, or is searched inside the answers
    answers         best first, if their order is known; ranks, scores: one for each
    labels          for a loss of labels: one bool
    options         JSON of what the chat template gets with the messages
    notes           reasons for the report; problem: why the row has to be dropped
    unread          a JSON list of the columns and message keys that are not read
    cache_key       unused here; `datasets` hashes it with the other arguments
    """
    source, needs, shape = Source(*source), Needs(*needs), Shape(*shape)
    layout = form = file_is_chat = None
    splits, labels = set(), set()
    for where, row_of_file in read_rows(source):
        row = Fields(row_of_file, where, shape.columns, shape.ignored)
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
        if file_is_chat not in (None, is_chat):
            kind, earlier = ("a list of messages", "text") if is_chat else ("text", "messages")
            raise UserError(f"{where}: the row is {kind}, but earlier rows are {earlier}; write "
                            "all rows of the file in one form")
        file_is_chat = is_chat

        common = {
            "chat": is_chat,
            "has_own_prompt": known.prompt is not None,
            "prompt": json.dumps(prompt) if is_chat else prompt,
            "weight": read_weight(row),
            "options": read_options(row, known, is_chat),
        }
        common["unread"] = json.dumps(unread_of(row, known, layout))
        check_one_split(row, splits)
        written = [json.dumps(answer) if is_chat else answer for answer in answers]
        for choice in choose_answers(known, needs, shape, where):
            labels.update(choice.labels)
            yield make_example(row, known, choice, written, needs, layout) | common
    if len(labels) == 1:
        raise UserError(f"{source.name}: every answer has the label {str(labels.pop()).lower()}; a "
                        "loss of labels needs good and bad answers")


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


def read_weight(row):
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
        raise UserError(f"{row.where}: has tools, which only a chat template writes, and its "
                        "prompt and answers are text; write them as messages; --ignore_columns "
                        "tools trains without them")
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
