"""One token for each character of a small alphabet, as nanoGPT's `shakespeare_char` has them."""

import hashlib
import json
import pickletools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpt2.errors import ModelFilesError, RequestError
from gpt2.files import check_inside_folder

_LARGEST_META = 2**24
_PLAIN_OPCODES = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "MEMOIZE",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BININT",
        "BININT1",
        "BININT2",
    ]
)
_EVERY_CHARACTER = r"[\s\S]"


class CharacterTokenizer:
    """Token i is the i-th of `characters`. Encoding a text with any other character raises RequestError.

    No token ends a text: `end_tokens` is empty. `end_of_text`, between documents and before a text, is the newline, as
    in nanoGPT's sampling; without a newline in the vocabulary it is the first character.
    """

    name = "characters"

    def __init__(self, characters: Sequence[str]) -> None:
        self._characters = list(characters)
        self._ids = {character: i for i, character in enumerate(self._characters)}
        self.vocab_size = len(self._characters)
        self.end_of_text = self._ids.get("\n", 0)
        self.end_tokens: tuple[int, ...] = ()
        self.prompt_prefix: tuple[int, ...] = ()
        self.special_tokens: dict[str, int] = {}
        self.fingerprint = hashlib.sha256(json.dumps(["characters", *self._characters]).encode()).hexdigest()

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}: {self.vocab_size:,} tokens, ends {list(self.end_tokens)}>"

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise RequestError(
                f"the model's vocabulary of {self.vocab_size} characters lacks {error.args[0]!r}"
            ) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(self.token_bytes(token).decode() for token in tokens)

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise RequestError(f"token {token} is not in the vocabulary, whose ids are 0 to {self.vocab_size - 1}")
        return self._characters[token].encode()

    def save(self, folder: Path) -> None:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        backend = Tokenizer(models.WordLevel(self._ids, unk_token=self._characters[0]))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(_EVERY_CHARACTER), "isolated")
        backend.decoder = decoders.Fuse()
        (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def characters_from_spec(spec: object) -> CharacterTokenizer | None:
    """The tokenizer in a parsed `tokenizer.json` that `CharacterTokenizer.save` wrote, else None."""
    try:
        model, cut = spec["model"], spec["pre_tokenizer"]  # pyright: ignore[reportIndexIssue]
        vocab = model["vocab"]
        if model["type"] != "WordLevel" or cut["pattern"] != {"Regex": _EVERY_CHARACTER}:
            return None
        characters = sorted(vocab, key=vocab.__getitem__)
        whole = [vocab[character] for character in characters] == list(range(len(characters)))
    except (KeyError, TypeError, AttributeError):
        return None
    return CharacterTokenizer(characters) if whole and all(len(each) == 1 for each in characters) else None


def read_meta_pkl(folder: Path) -> CharacterTokenizer | None:
    """The vocabulary in nanoGPT's `meta.pkl`, None without the file. Raises UserError if it is broken or links out."""
    path = folder / "meta.pkl"
    check_inside_folder(path, folder)
    return CharacterTokenizer(_characters(path)) if path.is_file() else None


def _characters(path: Path) -> list[str]:
    """`itos` of a `meta.pkl`. The pickle is not executed: only those of strings, integers and dictionaries are read."""
    try:
        content = path.read_bytes() if path.stat().st_size <= _LARGEST_META else b""
        for opcode, _, _ in pickletools.genops(content):
            if opcode.name not in _PLAIN_OPCODES:
                raise ValueError(f"it has the opcode {opcode.name}, which no vocabulary of characters needs")
        itos = _plain_value(content)["itos"]
        characters = [itos[i] for i in range(len(itos))]
    except Exception as error:  # pickletools raises anything for a broken file
        raise ModelFilesError(f"cannot use {path}: {error!r}") from error
    if not all(isinstance(each, str) and len(each) == 1 for each in characters) or not characters:
        raise ModelFilesError(f"cannot use {path}: its itos does not map 0, 1, 2, ... to characters")
    return characters


def _plain_value(content: bytes) -> Any:
    """The value of a pickle of strings, integers and dictionaries."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("SETITEM", "SETITEMS"):
            begin = marks.pop() if name == "SETITEMS" else len(stack) - 2
            pairs, stack = stack[begin:], stack[:begin]
            stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            stack.append(argument)
    return stack[-1]
