"""The fake server answers as vLLM does."""

import json
from pathlib import Path

import pytest
from real_answers import ASKED, ask

REAL_ANSWERS = Path(__file__).with_name("real_answers.json")


class TestBesideARealServer:
    """The fake's reply is the real one's, apart from numbers in vectors and what changes from run to run."""

    recorded = json.loads(REAL_ANSWERS.read_text()) if REAL_ANSWERS.exists() else {"answers": {}}

    def test_every_recorded_answer_is_compared(self):
        assert list(self.recorded["answers"]) == [asked["name"] for asked in ASKED]

    @pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked["name"])
    def test_same_answer(self, minilm, asked):
        assert ask(minilm, asked) == self.recorded["answers"][asked["name"]]
