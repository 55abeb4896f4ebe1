"""The demo model's tokenizer: one token a word of its language, bytes for everything else."""

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer

MAX_TOKENS = 32
"""Longest prompt in tokens, start and end marks included; longer ones are cut."""

_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def _byte_characters() -> list[str]:
    """Return printable stand-ins for the 256 bytes, as in byte-level BPE (Radford et al., 2019)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in kept else chr(next(spare)) for byte in range(256)]


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Learn merges by byte-pair encoding (Sennrich et al., 2016) until each word is one piece."""
    pieces = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            for index in range(len(word) - 1, 0, -1):
                if (word[index - 1], word[index]) == best:
                    word[index - 1 : index + 1] = ["".join(best)]
    return merges


def build_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Build a byte-level BPE tokenizer in CLIP's format, with one token for each of ``words``.

    Any other text splits into shorter pieces, at worst into bytes, so nothing is unknown.
    """
    characters = _byte_characters()
    merges = _learn_merges(words)
    tokens = [*characters, *(char + _WORD_END for char in characters)]
    tokens += sorted({"".join(pair) for pair in merges})
    tokens += [_START, _END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        unk_token=_END,
        bos_token=_START,
        eos_token=_END,
        pad_token=_END,
        model_max_length=MAX_TOKENS,
    )
