"""Reads the columns of a row, and remembers which of them are read.

    row = Fields({"prompt": "a cat", "responses": [" sat", " ran"], "source": "web"}, "row 1")
    row.dialogue("prompt"), row.list("responses")
    row.read                                   # {"prompt", "responses"}: `source` is not read

A cell of a CSV file is text, so a list, a number and a truth value may be text everywhere.
"""
import ast
import decimal
import math
import re

from conversations import beginning, is_message, parse_messages, read_messages
from errors import UserError, nearest
from registry import REAL
from sources import JSON, KeyTwiceError, Unreadable
from unread import is_blank

# A label as text or number.
TRUTH = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}

# The name of a row of a file whose objects have only the keys that were written.
JSON_OR_CSV = re.compile(r"\.(jsonl|json|csv), row \d+$", re.IGNORECASE)


class Fields:
    """The columns of one row under our names, after --columns."""

    def __init__(self, row: object, where: str, columns: tuple = (), ignored: tuple = (),
                 images: bool = False):
        self.where = where
        self.images = images  # whether the model sees them
        self.ignored = ignored
        self.theirs = dict(columns)  # our name: the file's name
        self.of_file = row if isinstance(row, dict) else {}
        self.values = rename_columns(self.of_file, self.theirs, where)
        self.read = set()  # the file's names of the columns that are read
        self.unread_keys = {}  # the keys of messages that are not read, as keys of a dict
        self.notes = set()
        # A file of Arrow has null where an object of another row has a key.
        self.adds_nulls = not JSON_OR_CSV.search(where)

    def name_of_file(self, name: str) -> str:
        return self.theirs.get(name, name)

    def has(self, name: str) -> bool:
        """Return whether a column exists, holds something and is not ignored."""
        is_ignored = self.name_of_file(name) in self.ignored
        return not is_ignored and not is_blank(self.values.get(name))

    def value(self, name: str):
        """Return the value of a column that the layout needs."""
        self.read.add(self.name_of_file(name))
        value = self.values.get(name)
        if value is None:
            raise UserError(f"{self.where}: the field '{name}' is missing or null")
        if isinstance(value, Unreadable):
            raise UserError(f"{self.where}: the field '{name}' cannot be read: {value.reason}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Read a text. default: of a column that may be missing or empty."""
        if default is not None and not self.has(name):
            return default
        return self.check_text(self.value(name), name)

    def check_text(self, value, name):
        if not isinstance(value, str):
            raise UserError(f"{self.where}: the field '{name}' holds {beginning(value)}, which is "
                            "not text")
        if not is_unicode(value):
            raise UserError(f"{self.where}: the field '{name}' holds half of a surrogate pair, "
                            "which is not text")
        return value

    def dialogue(self, name: str):
        """Read a text or a list of messages, which may be written as text."""
        return self.as_dialogue(self.value(name), name)

    def as_dialogue(self, value, name):
        """Check a value as `dialogue` does. name: the field, for errors."""
        if isinstance(value, str):
            value = parse_messages(value, name, self.where)
        if isinstance(value, dict) and is_message(value):
            value = [value]
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            if not is_unicode(value):
                self.check_text("\ud800", name)
            if self.adds_nulls:
                value = without_nulls(value)
            return read_messages(value, name, self)
        if not isinstance(value, str):
            raise UserError(f"{self.where}: the field '{name}' holds {beginning(value)}, which is "
                            "neither text nor a list of messages")
        return self.check_text(value, name)

    def messages(self, name: str) -> list:
        """Read a list of messages."""
        value = self.dialogue(name)
        if isinstance(value, str):
            raise UserError(f"{self.where}: the field '{name}' holds {beginning(value)}, which is "
                            "not a list of messages")
        return value

    def list(self, name: str) -> list:
        """Read a list, which may be written as text."""
        value = parse_literal(self.value(name), name, self.where)
        if not isinstance(value, list) or not value:
            raise UserError(f"{self.where}: the field '{name}' holds {beginning(value)}, which is "
                            "not a list with something in it")
        return value

    def dialogues(self, name: str) -> list:
        """Read a list of answers, each a text or a list of messages."""
        answers = []
        for number, value in enumerate(self.list(name), 1):
            answers.append(self.as_dialogue(value, f"{name}[{number}]"))
        return answers

    def dict(self, name: str) -> dict:
        """Read an object, which may be written as text."""
        value = parse_literal(self.value(name), name, self.where)
        if not isinstance(value, dict):
            raise UserError(f"{self.where}: the field '{name}' holds {beginning(value)}, which is "
                            "not an object")
        return value

    def number(self, name: str) -> float:
        return self.as_number(self.value(name), name)

    def as_number(self, value, name):
        number = number_of(value)
        if not math.isfinite(number):
            raise UserError(f"{self.where}: the field '{name}' holds {beginning(value)}, which is "
                            "not a finite number")
        return number

    def numbers(self, name: str, count: int) -> list:
        """Read one number for each of `count` answers."""
        values = self.list(name)
        if len(values) != count:
            raise UserError(f"{self.where}: the field '{name}' has {len(values)} numbers for "
                            f"{count} answers; give each answer one")
        return [self.as_number(value, name) for value in values]

    def score(self, name: str) -> float:
        """Read a column that only losses with scores need."""
        self.read.add(self.name_of_file(name))
        value = self.values.get(name)
        score = number_of(value)
        if not math.isfinite(score):
            raise UserError(f"{self.where}: the loss reads the field '{name}', a finite number, "
                            f"and the row has {beginning(value)}; rename a column with --columns "
                            f"{name}=NAME")
        return score

    def label(self, name: str) -> bool:
        """Read true or false, 1 or 0, or their text."""
        value = self.value(name)
        written = str(value).strip().lower()
        if isinstance(value, (list, dict)) or written not in TRUTH:
            raise UserError(f"{self.where}: the field '{name}' holds {beginning(value)}; a label "
                            "is true or false, or 1 or 0")
        return TRUTH[written]

    def choice(self, name: str, meanings: dict):
        """Read one of the values that a layout defines. meanings: {value as text: its meaning}."""
        value = self.value(name)
        written = str(value).strip().lower().removesuffix(".0")
        if written not in meanings:
            raise UserError(f"{self.where}: the field '{name}' holds {beginning(value)}; it is one "
                            f"of {', '.join(meanings)}")
        return meanings[written]


def rename_columns(row, columns, where):
    """Apply --columns, {our name: the file's name}, to a row."""
    if not columns:
        return row
    for name in columns.values():
        if name not in row:
            raise UserError(f"{where}: --columns names {name!r}; the row has "
                            f"{quote_names(row)}{nearest(name, row)}")
    taken = set(columns.values())
    renamed = {name: value for name, value in row.items() if name not in taken}
    for ours, theirs in columns.items():
        renamed[ours] = row[theirs]
    return renamed


def quote_names(names) -> str:
    return ", ".join(map(repr, names)) or "no fields at all"


def without_nulls(value):
    """Remove the keys of objects that are null, however deep."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def number_of(value) -> float:
    """Return a number, or a text that is one, as a float. Everything else is NaN."""
    is_number = isinstance(value, (int, float, decimal.Decimal)) and not isinstance(value, bool)
    if isinstance(value, str):
        is_number = REAL.fullmatch(value.strip()) is not None
    if not is_number:
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def is_unicode(value) -> bool:
    """Return False for half of a surrogate pair, which UTF-8 cannot encode, however deep."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [*item, *item.values()]
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str) and not item.isascii():
            try:
                item.encode()
            except UnicodeEncodeError:
                return False
    return True


def parse_literal(value, name, where):
    """Parse text that is a list or an object, as JSON or as Python writes it. Other values are
    returned unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return JSON.decode(value)
    except KeyTwiceError as error:
        raise UserError(f"{where}: the field '{name}' is JSON as text: {error}") from error
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise UserError(f"{where}: the field '{name}' holds text that begins as a list or an "
                        f"object and is not JSON: {value[:60]!r}; write it as JSON") from None
