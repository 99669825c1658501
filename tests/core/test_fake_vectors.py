"""The fake server's vectors and tokens."""

import numpy as np
import pytest
from _fake_client import client_of, embed, message, vectors
from hypothesis import given
from hypothesis import strategies as st

from vllm_embed.testing import FakeVLLMServer, count_tokens


class TestVectors:
    def test_the_reply_holds_what_vector_says(self, server, client):
        assert np.array_equal(vectors(embed(client, ["one"]))[0], server.vector("one"))

    def test_floats_and_base64_in_either_byte_order_hold_the_same_numbers(self, server, client):
        expected = server.vector("one")
        assert np.array_equal(vectors(embed(client, "one", encoding_format="float"))[0], expected)
        assert np.array_equal(vectors(embed(client, "one", endianness="little"), "<f4")[0], expected)
        assert np.array_equal(vectors(embed(client, "one", endianness="big"), ">f4")[0], expected)

    def test_two_servers_agree(self, server):
        assert np.array_equal(FakeVLLMServer(dimension=16).vector("one two"), server.vector("one two"))

    def test_texts_that_share_words_are_nearer(self):
        vector = FakeVLLMServer(dimension=384).vector
        question = vector("How tall is the tower?")
        assert question @ vector("The tower is 300 metres tall.") > 0.4 > question @ vector("Bread needs flour.") + 0.2

    @given(st.text(), st.text())
    def test_different_texts_differ_even_where_their_words_agree(self, one, other):
        vector = FakeVLLMServer(dimension=32).vector
        assert (one == other) == np.array_equal(vector(one), vector(other))

    @given(st.text())
    def test_every_text_has_a_finite_vector_of_unit_length(self, text):
        vector = FakeVLLMServer(dimension=32).vector(text)
        assert vector.dtype == np.float32
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)

    def test_raw_vectors_have_the_same_direction_and_another_length(self, server, client):
        raw_vector = vectors(embed(client, "one", use_activation=False))[0]
        length = np.linalg.norm(raw_vector)
        assert length > 1.2
        assert np.allclose(raw_vector / length, server.vector("one"), atol=1e-6)

    def test_a_model_without_a_normalize_module_gives_raw_vectors(self):
        assert np.linalg.norm(FakeVLLMServer(normalize=False).vector("one")) > 1.2

    def test_matryoshka_dimensions_are_the_first_numbers_normalized(self):
        with FakeVLLMServer(dimension=16, matryoshka=True) as server, client_of(server) as client:
            (cut,) = vectors(embed(client, "one", dimensions=4))
            first = server.vector("one")[:4]
            assert np.allclose(cut, first / np.linalg.norm(first), atol=1e-6)
            assert np.array_equal(cut, server.vector("one", dimensions=4))

    @pytest.mark.parametrize("dimensions", [0, 17])
    def test_matryoshka_dimensions_have_a_range(self, dimensions):
        with FakeVLLMServer(model="m", dimension=16, matryoshka=True) as server, client_of(server) as client:
            reply = embed(client, "one", dimensions=dimensions)
            assert reply.status_code == 400
            assert message(reply) == f"Model 'm' only supports dimensions in range [1, 16], got {dimensions}."

    def test_foreign_token_ids_get_the_wrong_vector_without_an_error(self, server, client):
        (wrong,) = vectors(embed(client, [[9906, 1917]]))
        assert np.array_equal(wrong, server.vector("9906 1917"))

    def test_usage_counts_the_tokens_of_all_texts(self, client):
        assert embed(client, ["one", "one two, three"]).json()["usage"]["prompt_tokens"] == 3 + 6


class TestTokens:
    @pytest.mark.parametrize(
        ("text", "tokens"),
        [("", 2), (" \n", 2), ("hello world", 4), ("hello, embeddings", 6), ("x" * 8, 3), ("x" * 9, 4), ("x" * 13, 5)],
    )
    def test_a_word_is_a_token_and_one_more_for_each_four_characters_after_eight(self, text, tokens):
        assert count_tokens(text) == tokens

    @given(st.text())
    def test_tokenize_and_the_limit_of_a_prompt_count_alike(self, minilm, text):
        reply = minilm.post("/tokenize", json={"prompt": text}).json()
        assert reply["count"] == len(reply["tokens"]) == count_tokens(text)

    def test_a_prompt_may_have_as_many_tokens_as_the_model_takes_and_no_more(self, client):
        assert embed(client, ["a " * 254]).status_code == 200
        assert "256 tokens" in message(embed(client, ["a " * 255]))

    @given(st.text(alphabet="ab ,é漢", max_size=60), st.integers(2, 8))
    def test_truncation_keeps_the_beginning_that_fits(self, text, limit):
        cut = FakeVLLMServer(max_model_len=limit).truncated(text)
        assert text.startswith(cut)
        assert count_tokens(cut) == min(count_tokens(text), limit)
        assert cut == text or count_tokens(text) > limit

    def test_a_truncated_text_gets_the_vector_of_what_is_left(self):
        with FakeVLLMServer(dimension=16, max_model_len=5) as server, client_of(server) as client:
            reply = embed(client, ["one two three four"], truncate_prompt_tokens=-1)
            assert server.truncated("one two three four") == "one two three"
            assert np.array_equal(vectors(reply)[0], server.vector("one two three"))
            assert reply.json()["usage"]["prompt_tokens"] == 5

    def test_detokenize_gives_the_words_back(self, minilm):
        tokens = minilm.post("/tokenize", json={"prompt": "Hello embeddings, again"}).json()["tokens"]
        assert minilm.post("/detokenize", json={"tokens": tokens}).json() == {
            "prompt": "[CLS] Hello embeddings , again [SEP]"
        }

    def test_ids_are_the_same_on_every_server_of_the_process(self, minilm, client):
        asked = {"prompt": "Hello embeddings, again"}
        assert minilm.post("/tokenize", json=asked).json() == client.post("/tokenize", json=asked).json()
