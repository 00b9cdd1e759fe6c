"""Errors a user can act on."""

import pickle

import pytest

from medaug.errors import DataError, LeakageError, well_formed


def test_a_field_that_is_missing_or_of_another_type_is_one_refusal() -> None:
    sentence = r"^\[x-malformed\] The file lacks the field 'classes'; make it again\.$"
    with pytest.raises(DataError, match=sentence), well_formed("x-malformed", "The file", "make it again"):
        dict[str, str]().pop("classes")
    for strange in ((), (3,), ("x" * 41,)):
        with (
            pytest.raises(DataError, match="The file lacks a field; make it again"),
            well_formed("x", "The file", "make it again"),
        ):
            raise KeyError(*strange)
    with pytest.raises(DataError, match=r"mistypes a field \(ValueError\)") as caught, well_formed("x-malformed", "It", "again"):
        int("Meier")
    assert "Meier" not in str(caught.value)


def test_other_errors_pass_unless_they_are_named() -> None:
    with pytest.raises(ZeroDivisionError), well_formed("x-malformed", "It", "again"):
        divmod(1, 0)
    with pytest.raises(DataError, match="ZeroDivisionError"), well_formed("x-malformed", "It", "again", ZeroDivisionError):
        divmod(1, 0)
    with pytest.raises(LeakageError, match="group-held-out"), well_formed("x-malformed", "It", "again"):
        raise LeakageError("group-held-out", "A group.")


def test_an_error_comes_back_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(DataError("code", "A sentence.")))
    assert (type(error), error.code, error.message) == (DataError, "code", "A sentence.")
