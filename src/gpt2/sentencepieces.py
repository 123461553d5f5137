"""SentencePiece models (Kudo and Richardson 2018), as rinna's GPT-2s have them, through the `sentencepiece` package."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpt2.errors import ModelFilesError, RequestError, UnsupportedTokenizer, missing_extra
from gpt2.files import check_inside_folder
from gpt2.tokenizer_components import check_file_size
from gpt2.tokenizer_settings import TokenizerSettings, read_settings

SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model")
_SPACE = "\u2581"


class SentencePieceTokenizer:
    """A SentencePiece model, with the special tokens that its folder names.

    A token is a piece of text, with a space for U+2581. Text starts with a space where the model was trained so.
    """

    name = "sentencepiece"

    def __init__(self, model: bytes, settings: TokenizerSettings) -> None:
        """Raises RuntimeError for a broken model, and UnsupportedTokenizer for one without an end of text."""
        self._model, self._settings = model, settings
        self._processor = _processor(model)
        size = self._processor.get_piece_size()
        pieces = [self._processor.id_to_piece(i) for i in range(size)]
        self._bytes = [self._piece_bytes(i, piece) for i, piece in enumerate(pieces)]
        special = {i: piece for i, piece in enumerate(pieces) if self._processor.is_control(i)}
        known = {piece: i for i, piece in enumerate(pieces)}
        special |= {known[text]: text for text in settings.special if text in known}
        special |= {i: token["content"] for i, token in settings.added.items() if i >= size}
        named = [text for text in settings.special if text not in special.values()]
        special |= dict(enumerate(named, start=max((size - 1, *special)) + 1))
        self._bytes += [b""] * (max((size - 1, *special)) + 1 - size)
        for i, text in special.items():
            self._bytes[i] = text.encode()
        self.special_tokens = {text: i for i, text in sorted(special.items())}
        self.vocab_size = len(self._bytes)
        end = settings.names.get("eos_token", pieces[self._processor.eos_id()] if self._processor.eos_id() >= 0 else "")
        if end not in self.special_tokens:
            raise UnsupportedTokenizer("the SentencePiece model has no end of text, and no file names an eos_token")
        self.end_of_text = self.special_tokens[end]
        self.end_tokens: tuple[int, ...] = (self.end_of_text,)
        self.prompt_prefix: tuple[int, ...] = ()
        self.fingerprint = hashlib.sha256(model + json.dumps(self.special_tokens).encode()).hexdigest()

    def _piece_bytes(self, i: int, piece: str) -> bytes:
        return bytes([int(piece[3:5], 16)]) if self._processor.is_byte(i) else piece.replace(_SPACE, " ").encode()

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}: {self.vocab_size:,} tokens, ends {list(self.end_tokens)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"end_tokens": self.end_tokens, "prompt_prefix": self.prompt_prefix}
        return SentencePieceTokenizer, (self._model, self._settings), state

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        if not allow_special:
            return self._processor.encode(text.encode("utf-8", "replace").decode())
        at, ids = 0, []
        while at < len(text):
            found = [(where, -len(each), each) for each in self.special_tokens if (where := text.find(each, at)) >= 0]
            begin, _, special = min(found, default=(len(text), 0, ""))
            if begin > at:
                ids += self.encode(text[at:begin])
            ids += [self.special_tokens[special]] if special else []
            at = begin + len(special)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise RequestError(f"token {token} is not in the vocabulary, whose ids are 0 to {self.vocab_size - 1}")
        return self._bytes[token]

    def save(self, folder: Path) -> None:
        (folder / SENTENCEPIECE_FILES[0]).write_bytes(self._model)
        added = {i: {"content": text, "special": True} for text, i in self.special_tokens.items()}
        config: dict[str, Any] = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, **self._settings.names}
        config["added_tokens_decoder"] = added
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def load_sentencepiece(folder: Path) -> SentencePieceTokenizer | None:
    """The SentencePiece model of a folder, None without one. Raises ModelFilesError for a broken one."""
    for path in (folder / name for name in SENTENCEPIECE_FILES):
        check_inside_folder(path, folder)
        if path.is_file():
            try:
                check_file_size(path)
                return SentencePieceTokenizer(path.read_bytes(), read_settings(folder))
            except (OSError, ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                raise ModelFilesError(f"cannot use {path}: {reason}") from error
    return None


def _processor(model: bytes) -> Any:
    try:
        import sentencepiece
    except ImportError:
        error = missing_extra("sentencepiece", "sentencepiece", "a SentencePiece tokenizer")
        raise UnsupportedTokenizer(str(error)) from None
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor
