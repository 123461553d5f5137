"""One token for each character of a small alphabet, as nanoGPT's `shakespeare_char` has them."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from gpt2.errors import RequestError

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
        self.special_tokens: dict[str, int] = {}
        self.fingerprint = hashlib.sha256(json.dumps(["characters", *self._characters]).encode()).hexdigest()

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
