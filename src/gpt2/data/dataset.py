"""What a run learns from: two splits, their batches, and the tokenizer that made them."""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpt2.data.loader import Batch, BatchLoader, TokenLoader, evaluation_batches
from gpt2.data.shards import ShardsMeta, TokenShards
from gpt2.tokenizer import Tokenizer

_PROMPT_TOKENS, _CONTINUATION_TOKENS = 24, 48
_HASHED_BLOCKS, _HASHED_BLOCK_BYTES = 16, 1 << 16  # how much of each shard its fingerprint reads


class Dataset(Protocol):
    """What training asks of its data, be it shards of text (`TokenData`) or rows of prompts and answers."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def train_tokens(self) -> int:
        """How many tokens there are to learn from."""
        ...

    @property
    def val_tokens(self) -> int | None:
        """How many are held out; None for none."""
        ...

    @property
    def bytes_per_token(self) -> float | None:
        """Of the text held out; None where it is not known."""
        ...

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change when the tokens do, or what they stand for, or what of them is learned."""
        ...

    def loader(self, batch_size: int, block_size: int, seed: int) -> BatchLoader:
        """Batches to learn from. Raises UserError when there is too little for one."""
        ...

    def validation_batches(self, batch_size: int, block_size: int, max_tokens: int | None) -> Iterator[Batch]:
        """What is held out, in order, each target once, at most `max_tokens` of them."""
        ...

    def token_counts(self, max_tokens: int) -> np.ndarray:
        """How often each token occurs in what is learned from, int64 (vocab_size,); of a sample of about `most`."""
        ...

    def prompts(self, count: int) -> list[tuple[str, str]]:
        """Some beginnings of what is held out, and how each goes on; of what is learned from if nothing is."""
        ...


@dataclass(frozen=True)
class TokenDataset:
    """Text as shards of tokens, in two splits.

    separate: do documents not see each other where they share a row? Else each row is one text.
    """

    name: str
    folder: Path
    train: TokenShards
    val: TokenShards | None  # None where nothing was held out, or too little to predict a token of
    tokenizer: Tokenizer
    meta: ShardsMeta | None  # None for shards that another program made
    separate_documents: bool = False

    @property
    def train_tokens(self) -> int:
        """See `Dataset`."""
        return len(self.train)

    @property
    def val_tokens(self) -> int | None:
        """See `Dataset`."""
        return None if self.val is None else len(self.val)

    @property
    def bytes_per_token(self) -> float | None:
        """See `Dataset`."""
        split = self.meta.splits.get("val") if self.meta else None
        return split.bytes / split.tokens if split and split.tokens else None

    @property
    def fingerprint(self) -> str:
        """See `Dataset`; where the files lie is no matter.

        The checksums of `meta.json` count where there are some; of the files themselves, the sizes and sixteen blocks
        spread over each, so that a hundred gigabytes take no longer than a moment.
        """
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        for split, shards in (("train", self.train), ("val", self.val)):
            if shards is None:
                continue
            if self.meta is not None and split in self.meta.splits:
                for file in self.meta.splits[split].files:
                    digest.update(f"{split} {file.tokens} {file.sha256}\n".encode())
            for path in shards.paths:
                _hash_sampled_blocks(digest, path)
        return digest.hexdigest()[:16]

    def loader(self, batch_size: int, block_size: int, seed: int) -> TokenLoader:
        """See `Dataset`."""
        return TokenLoader(self.train, batch_size, block_size, seed, document_start_token=self._document_start_token)

    def validation_batches(self, batch_size: int, block_size: int, max_tokens: int | None) -> Iterator[Batch]:
        """See `Dataset`."""
        if self.val is None:
            return iter(())
        return evaluation_batches(
            self.val, batch_size, block_size, max_tokens, document_start_token=self._document_start_token
        )

    def token_counts(self, max_tokens: int) -> np.ndarray:
        """See `Dataset`; of more than `most` tokens, pieces from all over the data are counted."""
        piece = 1 << 22
        step = piece * math.ceil(len(self.train) / max_tokens)
        counts = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        for start in range(0, len(self.train), step):
            some = self.train.read(start, min(start + piece, len(self.train)))
            counts += np.bincount(some, minlength=len(counts))
        return counts

    def prompts(self, count: int) -> list[tuple[str, str]]:
        """See `Dataset`; they lie evenly spread over the text."""
        tokens = self.train if self.val is None else self.val
        length = min(_PROMPT_TOKENS + _CONTINUATION_TOKENS, len(tokens))
        found = []
        for start in range(0, len(tokens) - length + 1, max(1, len(tokens) // count)):
            ids = tokens.read(start, start + length).tolist()
            border = min(_PROMPT_TOKENS, length - 1)
            found.append((self.tokenizer.decode(ids[:border]), self.tokenizer.decode(ids[border:])))
        return found[:count]

    @property
    def _document_start_token(self) -> int | None:
        return self.tokenizer.end_of_text if self.separate_documents else None


def _hash_sampled_blocks(digest: Any, path: Path) -> None:
    """Put a file's size and blocks spread over it, first and last among them, into a digest; a small file's all."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(f"{size}\n".encode())
        for block in range(_HASHED_BLOCKS):
            file.seek(max(0, size - _HASHED_BLOCK_BYTES) * block // (_HASHED_BLOCKS - 1))
            digest.update(file.read(_HASHED_BLOCK_BYTES))
