"""Reads each form of the rows of a layout, by a small function each: their row -> Row.

    {"prompt": "Sky?", "response_0": "Red.", "response_1": "Blue.", "better_response_id": 1}
    Row("Sky?", ["Red.", "Blue."], ranks=[1, 0])

LAYOUTS, at the end, is the table of all forms. layouts.py chooses one by the fields of a row.
"""
import functools
import math
import os
from collections.abc import Callable
from typing import NamedTuple

from conversations import TURN, as_messages, beginning, parse_messages, with_system
from errors import UserError
from fields import parse_literal, quote_names
from registry import Needs
from selection import Row

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
    names, prompt = fields, None
    if fields[0] == "prompt":
        names = fields[1:]
        prompt = row.dialogue("prompt")
    answers = [row.dialogue(name) for name in names]
    scores = []
    for name in names if needs.scores else ():
        is_needed = name in (needs.answers or BOTH)
        score = row.score(f"{name}_score") if is_needed else math.nan
        scores.append(score)
    return Row(prompt, answers, ranks=list(range(len(names))), scores=scores, names=names)


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
    return pair_row(row, needs, prompt, row.dialogue("chosen"), row.dialogue("rejected"))


def alpaca_prompt(row):
    """Make messages of instruction, input, history and system, as LLaMA-Factory does."""
    texts = [row.text("instruction", ""), row.text("input", "")]
    messages, turns = [], []
    if row.has("history"):
        turns = row.list("history")
    for turn in turns:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f"{row.where}: the field 'history' holds {beginning(turn)}; write each "
                            "turn as a list of a question and an answer")
        for role, text in zip(("user", "assistant"), turn):
            messages += as_messages(role, row.check_text(text, "history"))
    question = "\n".join(text for text in texts if text)
    if not question:
        raise UserError(f"{row.where}: the fields 'instruction' and 'input' are missing or empty")
    messages += as_messages("user", question)
    return with_system(messages, row.text("system", ""), row.where)


def read_alpaca(row, needs):
    prompt = alpaca_prompt(row)
    return pair_row(row, needs, prompt, row.text("chosen"), row.text("rejected"))


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


def read_orca(question, chosen, rejected, row, needs):
    messages = as_messages("user", row.text(question))
    prompt = with_system(messages, row.text("system", ""), row.where)
    return pair_row(row, needs, prompt, row.text(chosen), row.text(rejected))


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


def read_prompt_and_rejected(row, needs):
    return read_several_rejected(row, needs)._replace(prompt=row.dialogue("prompt"))


def read_several_rejected(row, needs):
    """One chosen answer, and rejected ones without an order."""
    rejected = row.dialogues("rejected")
    scores = []
    if needs.scores:
        scores = [row.score("chosen_score"), *row.numbers("rejected_score", len(rejected))]
    ranks = [0] + [1] * len(rejected)
    return Row(None, [row.dialogue("chosen"), *rejected], ranks=ranks, scores=scores)


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


def objects_of(row, name):
    """Yield (name of the field, object) of a column that is a list of objects."""
    for number, item in enumerate(row.list(name), 1):
        where = f"{name}[{number}]"
        if not isinstance(item, dict):
            raise UserError(f"{row.where}: the field '{where}' holds {beginning(item)}, which is "
                            "no object with an answer")
        yield where, item


def read_ultrafeedback(prompt, completions, row, needs):
    """UltraFeedback as it was made: completions of {response, overall_score}."""
    texts, scores = [], []
    for where, item in objects_of(row, completions):
        texts.append(row.as_dialogue(item.get("response"), f"{where}.response"))
        scores.append(score_of_completion(item, where, row))
    return Row(row.dialogue(prompt), texts, ranks=ranks_of(scores), scores=scores)


def score_of_completion(item, where, row):
    """Read the overall score of a completion, or the mean of its ratings."""
    for name in ("overall_score", "fine-grained_score", "score"):
        if item.get(name) is not None:
            return row.as_number(item[name], f"{where}.{name}")
    notes = item.get("annotations")
    if not isinstance(notes, dict):
        notes = {}
    ratings = []
    for name, note in notes.items():
        rating = note.get("Rating") if isinstance(note, dict) else note
        ratings.append(row.as_number(rating, f"{where}.annotations.{name}"))
    if not ratings:
        raise UserError(f"{row.where}: the field '{where}' has no overall_score and no ratings")
    return math.fsum(ratings) / len(ratings)


def read_nectar(row, needs):
    """Nectar: answers of {answer, rank}, of which the rank 1 is best."""
    texts, ranks = [], []
    for where, item in objects_of(row, "answers"):
        texts.append(row.as_dialogue(item.get("answer"), f"{where}.answer"))
        ranks.append(row.as_number(item.get("rank"), f"{where}.rank"))
    return Row(row.dialogue("prompt"), texts, ranks=ranks_of([-rank for rank in ranks]))


def has_completions(values):
    return holds_objects(values["completions"], "response")


def has_ranked_answers(values):
    return holds_objects(values["answers"], "rank")


def holds_objects(value, key):
    """Return whether a column is a list of objects with a key."""
    if isinstance(value, str):
        return f'"{key}"' in value or f"'{key}'" in value
    is_list = isinstance(value, list) and len(value) > 0
    return is_list and isinstance(value[0], dict) and key in value[0]


# --- Answers with labels --------------------------------------------------------------------------

def read_kto(prompt, completion, label, row, needs):
    """One answer and a label."""
    answers = [row.dialogue(completion)]
    return Row(row.dialogue(prompt), answers, labels=[row.label(label)], names=(completion,))


def read_kto_completion(completion, label, row, needs):
    """A dialogue with the prompt inside."""
    return Row(None, [row.dialogue(completion)], labels=[row.label(label)], names=(completion,))


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


def read_safe_rlhf(prompt, first, second, better, row, needs):
    """PKU-SafeRLHF: the number of the better response."""
    answers = [row.dialogue(first), row.dialogue(second)]
    verdict = row.choice(better, NUMBER_OF_BETTER)
    return two_answers(row.dialogue(prompt), answers, verdict)


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
    verdict = row.choice("winner", WINNER)
    return two_answers(None, answers, verdict)


def read_winner(row, needs):
    answers = [row.dialogue("response_a"), row.dialogue("response_b")]
    verdict = row.choice("winner", WINNER)
    return two_answers(row.dialogue("prompt"), answers, verdict)


def read_winner_flags(row, needs):
    """The Arena's files of turns: lists of texts, and a column of 0 and 1 for each result."""
    first_wins = row.label("winner_model_a")
    second_wins = row.label("winner_model_b")
    is_tie = row.has("winner_tie") and row.label("winner_tie")
    if first_wins + second_wins + is_tie > 1:
        raise UserError(f"{row.where}: has 1 in more than one of winner_model_a, winner_model_b "
                        "and winner_tie")
    answers = [arena_turns(row, "response_a"), arena_turns(row, "response_b")]
    return two_answers(None, answers, second_wins - first_wins)


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

def form(*fields, read, more=(), check=None):
    """Make a Form whose `read` takes the names of its fields first."""
    return Form(fields, functools.partial(read, *fields), more, check)


# Columns that several forms read if they are there.
SCORES = ("chosen_score", "rejected_score")
ALPACA = ("input", "history", "system")
DIALOGUE = ("system", "tools")

KTO = [
    form("prompt", "completion", "label", read=read_kto),
    form("prompt", "completion", "kto_tag", read=read_kto),
    form("completion", "label", read=read_kto_completion),
    Form(("instruction", "output", "kto_tag"), read_kto_alpaca, ALPACA),
    form("messages", "label", read=read_kto_messages, more=DIALOGUE),
    form("messages", "kto_tag", read=read_kto_messages, more=DIALOGUE),
    form("conversations", "label", read=read_kto_messages, more=DIALOGUE),
    form("conversations", "kto_tag", read=read_kto_messages, more=DIALOGUE),
]
SCORED = [
    form("prompt", "responses", "scores", read=read_scored),
    form("prompt", "completions", "scores", read=read_scored),
    form("prompt", "generations", "ratings", read=read_scored),
    form("prompt", "generations", "rating", read=read_scored),
    form("instruction", "generations", "ratings", read=read_scored),
    form("instruction", "generations", "rating", read=read_scored),
    form("input", "generations", "ratings", read=read_scored),
    form("input", "generations", "rating", read=read_scored),
    form("instruction", "completions", read=read_ultrafeedback, check=has_completions),
    form("prompt", "completions", read=read_ultrafeedback, check=has_completions),
    Form(("prompt", "answers"), read_nectar, check=has_ranked_answers),
]
LABELLED_PAIR = [
    form("prompt", "response_0", "response_1", "better_response_id", read=read_safe_rlhf),
    form("prompt", "response_0", "response_1", "safer_response_id", read=read_safe_rlhf),
    Form(("history", "human_ref_A", "human_ref_B", "labels"), read_shp, ("score_A", "score_B")),
    form("context", "response1", "response2", "overall_preference", read=read_helpsteer),
    form("prompt", "response_1", "response_2", "preference_strength", read=read_helpsteer),
    Form(("conversation_a", "conversation_b", "winner"), read_arena),
    Form(("prompt", "response_a", "response_b", "winner"), read_winner),
    Form(("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
         read_winner_flags, ("winner_tie",)),
    Form(("question", "answer_0", "answer_1", "score_0", "score_1"), read_webgpt),
    Form(("info", "summaries", "choice"), read_summaries),
]
LAYOUTS = {
    "trl": trl_forms(Needs()),
    "hh": [Form(BOTH, read_hh, SCORES, has_turns)],
    "sharegpt": [
        Form(("conversations", *BOTH), read_sharegpt, DIALOGUE + SCORES, lacks_prompt),
    ],
    "alpaca": [
        Form(("instruction", *BOTH), read_alpaca, ALPACA + SCORES, is_alpaca),
        Form(("instruction", "output"), read_alpaca_output, ALPACA, is_alpaca),
    ],
    "kto": KTO,
    "ranked": [Form(("prompt", "responses"), read_ranked, ("ranks",))],
    "scored": SCORED,
    "labelled_pair": LABELLED_PAIR,
    "openai": [Form(("input", "preferred_output", "non_preferred_output"), read_openai)],
    "orca": [
        form("question", *BOTH, read=read_orca, more=("system", *SCORES), check=has_system),
        form("input", *BOTH, read=read_orca, more=("system", *SCORES), check=has_system),
    ],
    "several_rejected": [
        Form(("prompt", *BOTH), read_prompt_and_rejected, SCORES, has_several_rejected),
        Form(BOTH, read_several_rejected, SCORES, has_several_rejected),
    ],
}
# Layouts whose rows say themselves which answer is better.
HAVE_VERDICTS = ("kto", "scored", "labelled_pair")
