"""Training data: two splits of tokens, their batches, and the tokenizer that made them."""

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
_HASHED_BLOCKS, _HASHED_BLOCK_BYTES = 16, 1 << 16  # the part of each shard that the fingerprint reads


class Dataset(Protocol):
    """What training requires of its data: token shards (`TokenDataset`) or prompts and answers (`InstructDataset`)."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def train_tokens(self) -> int:
        """Number of training targets."""
        ...

    @property
    def val_tokens(self) -> int | None:
        """Number of validation targets; None without a validation split."""
        ...

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text per token of the validation split, for bits per byte; None if unknown."""
        ...

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that depend on the tokens, the tokenizer and the targets."""
        ...

    def loader(self, batch_size: int, block_size: int, seed: int) -> BatchLoader:
        """Training batches. Raises DataError if the data is too short."""
        ...

    def validation_batches(self, batch_size: int, block_size: int, max_tokens: int | None) -> Iterator[Batch]:
        """The validation split in order, each target once, at most `max_tokens` of them (None: all)."""
        ...

    def token_counts(self, max_tokens: int) -> np.ndarray:
        """How often each token occurs in the training split, int64 (vocab_size,); of a sample of about `max_tokens`."""
        ...

    def prompts(self, count: int) -> list[tuple[str, str]]:
        """Prompts from the validation split (or else the training split), each with its true continuation."""
        ...


@dataclass(frozen=True)
class TokenDataset:
    """Text as token shards, in two splits.

    separate_documents: mask attention between documents that share a row of a batch.
    """

    name: str
    folder: Path
    train: TokenShards
    val: TokenShards | None  # None if nothing is held out, or fewer than two tokens
    tokenizer: Tokenizer
    meta: ShardsMeta | None  # None for shards of another program
    separate_documents: bool = False

    @property
    def train_tokens(self) -> int:
        return len(self.train)

    @property
    def val_tokens(self) -> int | None:
        return None if self.val is None else len(self.val)

    @property
    def bytes_per_token(self) -> float | None:
        split = self.meta.splits.get("val") if self.meta else None
        return split.bytes / split.tokens if split and split.bytes else None

    @property
    def fingerprint(self) -> str:
        """See `Dataset`; independent of the folder.

        It covers the checksums in `meta.json`, if there is one, and the size and sixteen evenly spaced blocks of each
        file, so it is fast for 100 GB, too.
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
        return TokenLoader(self.train, batch_size, block_size, seed, document_start_token=self._document_start_token)

    def validation_batches(self, batch_size: int, block_size: int, max_tokens: int | None) -> Iterator[Batch]:
        if self.val is None:
            return iter(())
        return evaluation_batches(
            self.val, batch_size, block_size, max_tokens, document_start_token=self._document_start_token
        )

    def token_counts(self, max_tokens: int) -> np.ndarray:
        """See `Dataset`; the sample is made of evenly spaced pieces."""
        piece = 1 << 22
        step = piece * math.ceil(len(self.train) / max_tokens)
        counts = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        for start in range(0, len(self.train), step):
            tokens = self.train.read(start, min(start + piece, len(self.train)))
            counts += np.bincount(tokens, minlength=len(counts))
        return counts

    def prompts(self, count: int) -> list[tuple[str, str]]:
        """See `Dataset`; evenly spaced in the text."""
        tokens = self.train if self.val is None else self.val
        length = min(_PROMPT_TOKENS + _CONTINUATION_TOKENS, len(tokens))
        found = []
        for start in range(0, len(tokens) - length + 1, max(1, len(tokens) // count)):
            ids = tokens.read(start, start + length).tolist()
            boundary = min(_PROMPT_TOKENS, length - 1)
            found.append((self.tokenizer.decode(ids[:boundary]), self.tokenizer.decode(ids[boundary:])))
        return found[:count]

    @property
    def _document_start_token(self) -> int | None:
        return self.tokenizer.end_of_text if self.separate_documents else None


def _hash_sampled_blocks(digest: Any, path: Path) -> None:
    """Update a digest with a file's size and evenly spaced blocks, the first and the last included."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(f"{size}\n".encode())
        for block in range(_HASHED_BLOCKS):
            file.seek(max(0, size - _HASHED_BLOCK_BYTES) * block // (_HASHED_BLOCKS - 1))
            digest.update(file.read(_HASHED_BLOCK_BYTES))
