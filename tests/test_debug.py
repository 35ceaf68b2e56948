"""`--debug` shows where an error comes from; without it an error is one line."""
import pytest

from errors import UserError, reading


def test_an_error_of_a_library_becomes_one_line_that_keeps_its_cause():
    with pytest.raises(UserError, match="^--model m: config.json: KeyError 'x'; do this$") as info:
        with reading("--model m: config.json", "; do this"):
            {}["x"]
    assert isinstance(info.value.__cause__, KeyError)
