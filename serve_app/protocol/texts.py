"""The texts of a request, checked before a tokenizer reads them."""

import unicodedata

from serve_app.errors import InvalidRequest


def check_texts(prompt: str, negative_prompt: str | None, most_chars: int) -> None:
    """Check that the prompt is not empty, and that both are Unicode and not too long.

    Raises:
        InvalidRequest: naming the field and what is allowed.
    """
    if not any(_is_visible(letter) for letter in prompt):
        raise InvalidRequest("prompt must not be empty.", "prompt")
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if text is not None and not _is_unicode(text):
            raise InvalidRequest(f"{name} is not valid Unicode; send it in UTF-8.", name)
        if text is not None and len(text) > most_chars:
            raise InvalidRequest(
                f"{name} has {len(text)} characters; at most {most_chars} are allowed.", name
            )


def _is_visible(letter: str) -> bool:
    """Return whether a character is neither a space nor a control character."""
    return unicodedata.category(letter) not in ("Cc", "Cf", "Zs", "Zl", "Zp")


def _is_unicode(text: str) -> bool:
    """Return whether a text is Unicode. Half a surrogate pair is not, and breaks tokenizers."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
