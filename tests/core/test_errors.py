"""The error tree: one root, picklable, secretive."""

import pickle

import numpy as np
import pytest

from vllm_embed import errors

CLASSES = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_pickles_with_its_attributes(kind: type[errors.VLLMEmbedError]) -> None:
    vectors = np.array([[1.0, np.nan]], dtype=np.float32)
    error = kind("what", endpoint="http://a/v1", model="m", status=400, attempts=2, indexes=[3, 1], vectors=vectors)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == "what"
    assert (again.endpoint, again.model, again.status, again.attempts, again.indexes) == (
        "http://a/v1",
        "m",
        400,
        2,
        (1, 3),
    )
    np.testing.assert_array_equal(again.vectors, vectors)


def test_the_tree_drawn_at_the_top_of_the_file_is_the_tree() -> None:
    drawn = {line.split("──")[1].split()[0] for line in errors.__doc__.splitlines() if "──" in line}
    assert drawn | {"VLLMEmbedError"} == set(errors.__all__)
    assert all(issubclass(kind, errors.VLLMEmbedError) for kind in CLASSES)
    assert issubclass(errors.InputTooLongError, errors.InvalidInputError)
    assert issubclass(errors.ConfigurationError, ValueError)


def test_a_copy_has_its_own_traceback_and_attributes() -> None:
    error = errors.ServerStatusError("one", status=500)
    twin = error.copy("two", attempts=3)
    assert (str(twin), twin.status, twin.attempts, str(error), error.attempts) == ("two", 500, 3, "one", 0)
