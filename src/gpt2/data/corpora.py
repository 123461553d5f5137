"""Corpora on the Hugging Face hub, by name or as ``hf://owner/name[/config][@revision][:split]``.

Nothing in here uses the network: see `gpt2.data.hub_files` for the files of a corpus.
"""

import re
from dataclasses import dataclass, replace

from gpt2.errors import DataError

HUB_PREFIX = "hf://"


@dataclass(frozen=True)
class Layout:
    """How documents become tokens and splits.

    end_of_text:        "before" each document, or "after" it.
    first_shard_is_val: the first shard is the validation split, as in llm.c.
    holdout:            every n-th document is held out for validation; 0 for none.
    separators:         whether ``<|endoftext|>`` in a text separates documents; else it is ordinary characters.
    """

    end_of_text: str = "after"
    first_shard_is_val: bool = False
    holdout: int = 0
    separators: bool = True

    def describe(self) -> str:
        """The convention in words."""
        if self.first_shard_is_val:
            held_out = "the first shard is validation"
        elif self.holdout:
            held_out = f"every {self.holdout}th document is validation"
        else:
            held_out = "the data set's own validation split"
        return f"end-of-text {self.end_of_text} each document, {held_out}"


LLMC = Layout("before", first_shard_is_val=True, separators=False)
OWN_SPLIT = Layout()
HELD_OUT = Layout(holdout=10)


@dataclass(frozen=True)
class HubRef:
    """A data set on the hub. config, revision, split: None for the usual one."""

    repo: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        config, split = f"/{self.config}" if self.config else "", f":{self.split}" if self.split else ""
        return f"{HUB_PREFIX}{self.repo}{config}{f'@{self.revision}' if self.revision else ''}{split}"


@dataclass(frozen=True)
class HubCorpus:
    """A corpus on the hub.

    layout:  None for what the data set's splits give: its own validation split, or else every tenth document.
    column:  of the text; None to find it.
    tokens, download: about how many GPT-2 tokens, and bytes to download; 0 if unknown.
    join:    whether rows are lines of articles, as in WikiText, that become one document each.
    """

    name: str
    ref: HubRef
    layout: Layout | None = None
    column: str | None = None
    tokens: int = 0
    download: int = 0
    licence: str = ""
    description: str = ""
    join: bool = False
    is_tokens: bool = False


_M, _B = 10**6, 10**9
_ODC = "ODC-By 1.0"

# Tokens and sizes are rounded, from the cards of the data sets and from nanoGPT's and modded-nanogpt's notes.
HUB_CORPORA = {corpus.name: corpus for corpus in (
    HubCorpus("fineweb-edu-10B", HubRef("HuggingFaceFW/fineweb-edu", "sample-10BT"), LLMC, "text", 10 * _B, 28_500 * _M,
              _ODC, "educational web pages, the sample of the GPT-2 reproduction"),
    HubCorpus("fineweb-edu-100B", HubRef("HuggingFaceFW/fineweb-edu", "sample-100BT"), LLMC, "text", 100 * _B, 285 * _B,
              _ODC, "ten times as much of it"),
    HubCorpus("fineweb-10B", HubRef("HuggingFaceFW/fineweb", "sample-10BT"), LLMC, "text", 10 * _B, 30 * _B,
              _ODC, "web pages"),
    HubCorpus("openwebtext", HubRef("Skylion007/openwebtext"), LLMC, "text", 9 * _B, 24 * _B,
              "CC0 1.0", "pages that Reddit links to: what GPT-2's WebText was made of"),
    HubCorpus("tinystories", HubRef("roneneldan/TinyStories"), OWN_SPLIT, "text", 470 * _M, 1 * _B,
              "CDLA-Sharing 1.0", "short stories in simple words"),
    HubCorpus("wikitext-103", HubRef("Salesforce/wikitext", "wikitext-103-raw-v1"), OWN_SPLIT, "text", 120 * _M,
              315 * _M, "CC BY-SA 3.0", "Wikipedia articles", join=True),
    HubCorpus("fineweb-10B-tokens", HubRef("kjj0/fineweb10B-gpt2"), None, None, 10 * _B, 20_600 * _M,
              _ODC, "FineWeb as GPT-2 tokens, ready to train on", is_tokens=True),
    HubCorpus("fineweb-edu-100B-tokens", HubRef("karpathy/fineweb-edu-100B-gpt2-token-shards"), None, None, 100 * _B,
              200 * _B, _ODC, "FineWeb-Edu as GPT-2 tokens, ready to train on", is_tokens=True),
)}  # fmt: skip


def find_corpus(ref: str) -> HubCorpus | None:
    """The corpus on the hub that a data reference names; None for another one. Raises DataError for a bad hf:// one."""
    if ref in HUB_CORPORA:
        return HUB_CORPORA[ref]
    if not ref.startswith(HUB_PREFIX):
        return None
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([^@:]+))?(?:@([^:]+))?(?::([\w.-]+))?", ref.removeprefix(HUB_PREFIX))
    if match is None:
        raise DataError(f"'{ref}' is not of the form hf://owner/name[/config][@revision][:split]", field="data")
    parsed = HubRef(*match.groups())
    known = next((one for one in HUB_CORPORA.values() if one.ref == replace(parsed, revision=None)), None)
    if known is not None:
        return replace(known, ref=parsed)
    return HubCorpus(parsed.repo.split("/")[1], parsed)
