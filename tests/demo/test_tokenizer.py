from random import Random

from hypothesis import given
from hypothesis import strategies as st

from serve_app.demo.tokenizer import MAX_TOKENS, build_tokenizer
from tools.demo_model.scenes import caption, sample_scene, vocabulary

tokenizer = build_tokenizer(vocabulary())


def test_each_word_is_one_token() -> None:
    for word in vocabulary():
        assert len(tokenizer(word).input_ids) == 3, word


def test_captions_fit() -> None:
    rng = Random(4)
    longest = max(len(tokenizer(caption(sample_scene(rng), rng)).input_ids) for _ in range(2_000))
    assert longest <= MAX_TOKENS


@given(st.text(max_size=60))
def test_any_text_survives(text: str) -> None:
    ids = tokenizer(text, padding="max_length", truncation=True).input_ids
    assert len(ids) == MAX_TOKENS
    assert all(0 <= token < len(tokenizer) for token in ids)


@given(st.text(alphabet=st.characters(categories=["Ll", "Lo", "So"]), min_size=1, max_size=8))
def test_other_languages_keep_their_meaning(word: str) -> None:
    composed = tokenizer(word).input_ids
    assert tokenizer.decode(composed, skip_special_tokens=True).replace(" ", "") != ""
