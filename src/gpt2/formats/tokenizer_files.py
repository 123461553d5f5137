"""Tokenizers of other formats: built from lists of tokens and merges, and cut to a model's vocabulary."""

import json
from collections.abc import Iterable, Sequence

from gpt2.tokenizer import (
    BPETokenizer,
    ByteLevelTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    make_byte_tokenizer,
    recognize_tokenizer,
)
from gpt2.vocabulary import (
    END_OF_TEXT,
    Vocabulary,
    build_backend,
    decode_byte_level,
    tiktoken_encoding,
    tokenizers_errors,
    vocabulary_from_token_ids,
)


def tokenizer_from_merges(
    tokens: Sequence[str],
    merges: Iterable[tuple[str, str]],
    special: Sequence[int] = (),
    non_special: Sequence[int] = (),
) -> Tokenizer:
    """The tokenizer of a list of tokens and merges, spelled as in `vocab.json`.

    special:     ids of the added tokens that ordinary text never encodes to.
    non_special: ids of the added tokens that are matched in ordinary text.
    Raises ValueError if it is not byte-level BPE.
    """
    from tokenizers import Tokenizer as Backend

    added = {tokens[i] for i in (*special, *non_special)} | {END_OF_TEXT}
    if len(set(tokens)) != len(tokens):
        raise ValueError("a token occurs twice")
    vocabulary = vocabulary_from_token_ids({token: i for i, token in enumerate(tokens)}, added_tokens=added)
    if not non_special and (known := recognize_tokenizer(vocabulary)):
        return known
    known_tokens = {token for i, token in enumerate(vocabulary.tokens) if i not in vocabulary.added_ids}
    pairs = [(decode_byte_level(left), decode_byte_level(right)) for left, right in merges if left not in added]
    for left, right in pairs:
        if not known_tokens.issuperset((left, right, left + right)):
            raise ValueError(f"a merge makes {(left + right)!r} of {left!r} and {right!r}, not all of which are tokens")
    with tokenizers_errors():
        spec = json.loads(build_backend(vocabulary, pairs).to_str())
        for token in spec["added_tokens"]:
            token["special"] = token["id"] not in non_special
        backend = Backend.from_str(json.dumps(spec))
    return BPETokenizer(backend)


def fit_to_vocab_size(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The tokenizer without the added tokens for which a model of `vocab_size` has no embedding.

    Raises ValueError if ordinary tokens are among them: then it is the tokenizer of another model.
    """
    if tokenizer.vocab_size <= vocab_size:
        return tokenizer
    vocabulary = tokenizer._vocabulary if isinstance(tokenizer, ByteLevelTokenizer) else None
    if tokenizer.end_of_text >= vocab_size:
        raise ValueError(f"the model has no embedding for token {tokenizer.end_of_text}, the tokenizer's end of text")
    if vocabulary is None or not vocabulary.added_ids.issuperset(range(vocab_size, len(vocabulary.tokens))):
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {vocab_size}")
    rest = Vocabulary(vocabulary.tokens[:vocab_size], vocabulary.added_ids.intersection(range(vocab_size)))
    if not isinstance(tokenizer, BPETokenizer):
        is_gpt2 = isinstance(tokenizer, GPT2Tokenizer)
        fit = GPT2Tokenizer(tiktoken_encoding(rest)) if is_gpt2 else make_byte_tokenizer(rest)
        _copy_roles(tokenizer, fit)
        return fit
    from tokenizers import Tokenizer as Backend

    spec = json.loads(tokenizer._backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < vocab_size]
    spec["model"]["vocab"] = {token: i for token, i in spec["model"]["vocab"].items() if i < vocab_size}
    fit = BPETokenizer(Backend.from_str(json.dumps(spec)), tokenizer._end_of_text)
    _copy_roles(tokenizer, fit)
    return fit


def _copy_roles(tokenizer: Tokenizer, fit: Tokenizer) -> None:
    """Give `fit` the end tokens and the prompt prefix, as far as it has these ids."""
    ends = tuple(token for token in tokenizer.end_tokens if token < fit.vocab_size)
    fit.end_tokens = ends or (fit.end_of_text,)
    fit.prompt_prefix = tuple(token for token in tokenizer.prompt_prefix if token < fit.vocab_size)
