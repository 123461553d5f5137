"""Text to tokens and back: GPT-2's own vocabulary, one trained on your text, or plain bytes.

All three are byte-level: a token is a piece of UTF-8, so every text can be encoded, and decoding concatenates bytes.

    gpt2     the 50,256 tokens that OpenAI trained on WebText (Radford et al. 2019, section 2.2)
    bpe:N    tokens trained on your text by the same method, byte-pair encoding (Sennrich et al. 2016)
    bytes    the 256 bytes

Each has one special token more, which ordinary text never encodes to: ``<|endoftext|>``, between documents. The
classes are in `gpt2.byte_level`; here they are made: by name, from files, trained, and with more tokens.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from gpt2.byte_level import BPETokenizer, ByteLevelTokenizer, ByteTokenizer, GPT2Tokenizer, Tokenizer
from gpt2.characters import characters_from_spec
from gpt2.end_tokens import read_end_tokens
from gpt2.errors import ConfigError, ModelFilesError, UnsupportedTokenizer, did_you_mean
from gpt2.files import check_inside_folder, expand_path
from gpt2.progress import run_cancellable
from gpt2.sentencepieces import load_sentencepiece
from gpt2.tokenizer_components import check_components, check_file_size
from gpt2.tokenizer_settings import (
    apply_settings,
    end_of_text_name,
    merges_beside,
    prompt_prefix,
    read_settings,
    spec_from_vocab_json,
)
from gpt2.vocabulary import (
    END_OF_TEXT,
    MAX_VOCAB_SIZE,
    UnsupportedTokenizerError,
    Vocabulary,
    build_backend,
    check_byte_level_bpe,
    decode_byte_level,
    extend_vocabulary,
    has_only_simple_special_tokens,
    replace_surrogates,
    split_long_words,
    tiktoken_encoding,
    tokenizers_errors,
    uses_gpt2_pre_tokenizer,
    vocabulary_fingerprint,
    vocabulary_from_tokenizer_json,
)

GPT2_FINGERPRINT = "a66433cec9b7b05c65088583bc6c7110e4e6babdbb0fb4cf299aca8f31cd176e"

_MAX_WORD_BYTES = 8_000_000  # of different words to train a BPE on

_log = logging.getLogger("gpt2")


def train_bpe(texts: Iterable[str], vocab_size: int, while_waiting: Callable[[], None] = lambda: None) -> BPETokenizer:
    """Train a byte-level BPE: the most frequent pair of tokens becomes a token, again and again.

    `vocab_size` includes the 256 bytes, which are first, and ``<|endoftext|>``, which is last. Only pairs that occur
    twice are merged, so short texts give a smaller vocabulary, with a warning in the log. A word of more than 1,000
    characters counts as several. Once the texts have 8 MB of different words, others do not count, with a warning, too:
    so memory is bounded. The result is deterministic. `while_waiting` is called four times a second.

    Raises ConfigError for a `vocab_size` outside 257 to 65,536.
    """
    if not 257 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ConfigError(f"a BPE vocabulary has 257 to {MAX_VOCAB_SIZE} tokens, not {vocab_size}", field="tokenizer")
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def train(check: Callable[[], None]) -> None:
        def pieces() -> Iterator[str]:
            for text in _bound_words(texts):
                check()
                yield from split_long_words(replace_surrogates(text))

        backend.train_from_iterator(pieces(), trainer)

    run_cancellable(train, while_waiting)
    model = json.loads(backend.to_str())["model"]
    tokens = [decode_byte_level(text) for text in sorted(model["vocab"], key=model["vocab"].__getitem__)]
    merges = [(decode_byte_level(left), decode_byte_level(right)) for left, right in model["merges"]]
    if len(tokens) + 1 < vocab_size:
        _log.warning("the text is enough for a vocabulary of %d tokens, not %d", len(tokens) + 1, vocab_size)
    vocabulary = Vocabulary([*tokens, END_OF_TEXT.encode()], frozenset({len(tokens)}))
    return BPETokenizer(build_backend(vocabulary, merges))


def _bound_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts; after `_MAX_WORD_BYTES` of different words, without any that is new. A word is what is between spaces.

    The trainer keeps every different word, at about 100 bytes for each of its bytes.
    """
    seen: set[str] = set()
    size = left_out = 0
    for text in texts:
        words = text.split(" ")
        if size < _MAX_WORD_BYTES:
            new = set(words).difference(seen)
            seen |= new
            size += sum(len(word) if word.isascii() else len(word.encode("utf-8", "replace")) for word in new)
            yield text
        else:
            known = [word for word in words if word in seen]
            left_out += len(words) - len(known)
            yield " ".join(known)
    if left_out:
        _log.warning(
            "the vocabulary is trained on the first %s different words: %s occurrences of others were left out",
            f"{len(seen):,}",
            f"{left_out:,}",
        )


def with_special_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """The tokenizer with more special tokens, such as ``<|user|>``, whose ids are last.

    Raises ConfigError for a text that is empty, a token already, or overlaps ``<|endoftext|>``, and for more than
    65,536 tokens.
    """
    vocabulary = _extend(tokenizer, texts)
    if isinstance(tokenizer, BPETokenizer):
        backend = copy.deepcopy(tokenizer._backend)
        backend.add_special_tokens(list(texts))
        extended = BPETokenizer(backend, tokenizer._end_of_text)
    elif isinstance(tokenizer, GPT2Tokenizer):
        extended = GPT2Tokenizer(tiktoken_encoding(vocabulary))
    else:
        extended = make_byte_tokenizer(vocabulary)
    extended.end_tokens, extended.prompt_prefix = tokenizer.end_tokens, tokenizer.prompt_prefix
    return extended


def with_added_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """The tokenizer with more words, whose ids are last: in any text each is encoded as one token.

    Raises ConfigError as `with_special_tokens` does.
    """
    from tokenizers import AddedToken

    _extend(tokenizer, texts)  # for its errors
    assert isinstance(tokenizer, ByteLevelTokenizer)
    backend = copy.deepcopy(tokenizer._backend)
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    extended = BPETokenizer(backend, tokenizer._end_of_text)
    extended.end_tokens, extended.prompt_prefix = tokenizer.end_tokens, tokenizer.prompt_prefix
    return extended


def _extend(tokenizer: Tokenizer, texts: Sequence[str]) -> Vocabulary:
    if not isinstance(tokenizer, ByteLevelTokenizer):
        raise TypeError(f"{type(tokenizer).__name__} is not a tokenizer of this module")
    return extend_vocabulary(tokenizer._vocabulary, texts)


def get_tokenizer(ref: str | Path) -> Tokenizer:
    """The tokenizer ``gpt2`` or ``bytes``, or the one in a folder. Raises UserError for any other name."""
    if ref == "gpt2":
        return GPT2Tokenizer()
    if ref == "bytes":
        return ByteTokenizer()
    if isinstance(ref, str) and ref.split(":")[0] == "bpe":
        if not ref.removeprefix("bpe:").isdecimal():
            raise ConfigError(f"tokenizer '{ref}': bpe:N needs a number of tokens, as in bpe:1024", field="tokenizer")
        raise ConfigError(
            f"tokenizer '{ref}' is trained on text, which there is none of here: name gpt2, bytes, or the folder of a "
            "tokenizer (gpt2 data prepare writes one)",
            field="tokenizer",
        )
    folder = expand_path(ref)
    if not folder.is_dir():
        hint = did_you_mean(str(ref), ["gpt2", "bytes", "bpe:N"])
        raise ConfigError(
            f"no tokenizer '{ref}'{hint}: name gpt2, bytes, bpe:N, or a folder with tokenizer files", field="tokenizer"
        )
    tokenizer = load_tokenizer(folder) or load_tokenizer(folder / "model")  # in a run folder
    if tokenizer is None:
        raise ModelFilesError(f"no tokenizer in {folder}: it needs tokenizer.json, or vocab.json with merges.txt")
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer whose files are in `folder`; None if there are none.

    `tokenizer.json` has precedence over `vocab.json` with `merges.txt`, these over `encoder.json` with `vocab.bpe`,
    OpenAI's names, and these over `spiece.model`. GPT-2's vocabulary and the plain bytes are recognized by their
    contents, and need no merges. Its `end_tokens` are those of the model folder.
    Raises ModelFilesError for a broken file, and UnsupportedTokenizer for one that is not byte-level BPE.
    """
    for name in ("tokenizer.json", "vocab.json", "encoder.json"):
        path = folder / name
        if path.is_file():
            for used in (path, folder / "merges.txt", folder / "vocab.bpe"):
                check_inside_folder(used, folder)
            try:
                check_file_size(path)
                return _read_tokenizer(path)
            except UnsupportedTokenizerError as error:
                raise UnsupportedTokenizer(f"cannot use {path}: {error}") from error
            except (OSError, ValueError, RecursionError) as error:
                raise ModelFilesError(f"cannot use {path}: {error}") from error
    tokenizer = load_sentencepiece(folder)
    if tokenizer is not None:
        tokenizer.end_tokens = read_end_tokens(folder, tokenizer.vocab_size, tokenizer.end_tokens)
    elif (folder / "vocab.txt").is_file():
        raise UnsupportedTokenizer(f"cannot use {folder / 'vocab.txt'}: it is not byte-level BPE")
    return tokenizer


def _read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json` or `vocab.json`, and the files beside it. Raises ValueError and UserError."""
    import tokenizers

    settings, raw = read_settings(path.parent), json.loads(path.read_text(encoding="utf-8"))
    is_complete = path.name == "tokenizer.json"
    tokenizer: Tokenizer | None = characters_from_spec(raw) if is_complete else None
    if tokenizer is None:
        spec = raw if is_complete else spec_from_vocab_json(raw)
        check_byte_level_bpe(spec)
        apply_settings(spec, settings)
        end_of_text = end_of_text_name(spec, settings)
        vocabulary = vocabulary_from_tokenizer_json(spec, end_of_text)
        check_components(spec)
        if uses_gpt2_pre_tokenizer(spec) and has_only_simple_special_tokens(spec) and end_of_text == END_OF_TEXT:
            tokenizer = recognize_tokenizer(vocabulary)
        if tokenizer is None:
            if not is_complete:
                spec["model"]["merges"] = merges_beside(path, vocabulary)
            with tokenizers_errors():
                backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
            tokenizer = BPETokenizer(backend, end_of_text)
        bos, eos = (settings.names.get(name, end_of_text) for name in ("bos_token", "eos_token"))
        adds_bos = settings.add_bos_token and not is_complete  # tokenizer.json has a post-processor for it
        tokenizer.prompt_prefix = (tokenizer.special_tokens[bos],) if adds_bos else prompt_prefix(spec)
        tokenizer.end_tokens = (tokenizer.special_tokens[eos],)
    tokenizer.end_tokens = read_end_tokens(path.parent, tokenizer.vocab_size, tokenizer.end_tokens)
    return tokenizer


def recognize_tokenizer(vocabulary: Vocabulary) -> Tokenizer | None:
    """GPT-2's tokenizer or the bytes, if the vocabulary is that, with only added tokens after ``<|endoftext|>``."""
    size = vocabulary.tokens.index(END_OF_TEXT.encode()) + 1
    if not vocabulary.added_ids.issuperset(range(size, len(vocabulary.tokens))):
        return None
    base = Vocabulary(vocabulary.tokens[:size], vocabulary.added_ids.intersection(range(size)))
    fingerprint = vocabulary_fingerprint(base)
    if fingerprint == GPT2_FINGERPRINT:
        return GPT2Tokenizer(tiktoken_encoding(vocabulary))
    return make_byte_tokenizer(vocabulary) if fingerprint == ByteTokenizer().fingerprint else None


def make_byte_tokenizer(vocabulary: Vocabulary) -> ByteTokenizer:
    """The byte tokenizer with the special tokens that follow ``<|endoftext|>`` in `vocabulary`."""
    return ByteTokenizer([token.decode() for token in vocabulary.tokens[257:]])
