"""Errors cross process boundaries: all of them must come out of a pickle as they went in."""

from __future__ import annotations

import pickle

import pytest
from ray import cloudpickle

from rlhf_ray import errors


def hierarchy(kind: type[errors.RlhfRayError]) -> list[type[errors.RlhfRayError]]:
    return [kind, *(inner for child in kind.__subclasses__() for inner in hierarchy(child))]


KINDS = hierarchy(errors.RlhfRayError)


def test_the_whole_hierarchy_is_tested() -> None:
    defined = {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert defined == set(KINDS)
    assert len(KINDS) == 15
    users = {"UserError", "ConfigError", "DataError", "ModelError", "ResourceError"}
    assert {kind.__name__ for kind in KINDS if issubclass(kind, errors.UserError)} == users


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("library", [pickle, cloudpickle], ids=["pickle", "ray"])
def test_round_trip(kind: type[errors.RlhfRayError], library: object) -> None:
    error = kind("online.num_steps=0: must be at least 1", "seed: missing")
    copy = library.loads(library.dumps(error))  # type: ignore[attr-defined]
    assert type(copy) is kind
    assert copy.args == error.args
    assert str(copy) == str(error)


def test_several_mistakes_are_lines_of_one_message() -> None:
    error = pickle.loads(pickle.dumps(errors.ConfigError("first", "second")))
    assert error.mistakes == ("first", "second")
    assert str(error) == "first\nsecond"
