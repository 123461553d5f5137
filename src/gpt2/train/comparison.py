"""Before and after: what fine-tuning changed, for better and for worse."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2.config import TrainConfig
from gpt2.data.dataset import Dataset
from gpt2.data.prepare import open_data
from gpt2.model import GPT
from gpt2.runtime import parse_dtype
from gpt2.train.setup import start
from gpt2.train.trainer import Sampler, mean_loss
from gpt2.weights import load

GENERAL = "python-docs"  # a text that everybody has, and hardly anybody fine-tunes for
MOST_TOKENS = 16_384  # that are read of each text
PROMPTS = 3


@dataclass(frozen=True)
class Losses:
    """Mean loss of one text in nats per token, before and after."""

    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Answers:
    """What both said to one prompt, and what the data has there."""

    prompt: str
    wanted: str
    before: str
    after: str


@dataclass(frozen=True)
class Comparison:
    """The base model and the tuned one, side by side."""

    losses: list[Losses]
    answers: list[Answers]

    def markdown(self) -> str:
        """A section for report.md."""
        lines = ["## Before and after", "", "| perplexity | before | after |  |", "| :-- | --: | --: | :-- |"]
        for one in self.losses:
            lines.append(f"| {one.text} | {_perplexity(one.before)} | {_perplexity(one.after)} | {_verdict(one)} |")
        for answer in self.answers:
            lines += ["", *_quoted("prompt", answer.prompt), *_quoted("wanted", answer.wanted)]
            lines += [*_quoted("before", answer.before), *_quoted("after", answer.after)]
        return "\n".join(lines) + "\n"


def compare(config: TrainConfig, folder: Path, sampler: Sampler) -> Comparison:
    """Read the validation data and a general text with both models, and let both answer the same prompts.

    config: of a run that is over. folder: its run folder. sampler: as for `trainer.train`.
    """
    base, data, _ = start(config, None)
    device, dtype = torch.device(config.device), parse_dtype(config.dtype)
    general = open_data(GENERAL, data.tokenizer)
    texts: dict[str, Dataset] = {f"{data.name}, held out": data} if data.val_tokens else {}
    if general.name != data.name:
        texts[f"{general.name}, which it was not tuned for"] = general
    prompts = [(config.sample_prompt, "")] if config.sample_prompt else data.prompts(PROMPTS)

    def read(model: GPT) -> tuple[list[float], list[str]]:
        model = model.to(device).eval()
        losses = []
        for text in texts.values():
            block = min(config.block_size, model.config.block_size)
            losses.append(mean_loss(model, text.validation(config.batch_size, block, MOST_TOKENS), dtype))
        answers = []
        for prompt, _ in prompts:
            said = sampler(model, data.tokenizer, prompt, config.sample_tokens) if config.sample_tokens else prompt
            answers.append(said.removeprefix(prompt))
        return losses, answers

    losses, answers = read(base)
    del base  # two of them need not be there at once
    losses_after, answers_after = read(load(folder / "model")[0])
    return Comparison(
        [Losses(*values) for values in zip(texts, losses, losses_after, strict=True)],
        [Answers(*p, before, after) for p, before, after in zip(prompts, answers, answers_after, strict=True)],
    )


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700)):,.2f}"


def _verdict(losses: Losses) -> str:
    change = math.expm1(min(losses.after - losses.before, 700))
    return "the same" if abs(change) < 0.005 else f"{abs(change):.0%} {'better' if change < 0 else 'worse'}"


def _quoted(name: str, text: str) -> list[str]:
    """A text that may hold anything, under its name, as a block of its own."""
    text = text.strip("\n")
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{name}:", "", fence + "text", text, fence, ""] if text else []
