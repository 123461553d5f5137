"""Comparison of a fine-tuned model with its base model: perplexities and generated samples."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2.config import TrainConfig
from gpt2.data.dataset import Dataset
from gpt2.data.prepare import open_data
from gpt2.model import GPT
from gpt2.runtime import parse_dtype
from gpt2.train.setup import load_model_and_data
from gpt2.train.trainer import Sampler, mean_loss
from gpt2.weights import load

GENERAL_CORPUS = "python-docs"  # always available, and rarely the fine-tuning data
MAX_TOKENS = 16_384  # evaluated per text
NUM_PROMPTS = 3


@dataclass(frozen=True)
class LossComparison:
    """Mean loss of one text in nats per token, before and after fine-tuning."""

    text: str
    before: float
    after: float


@dataclass(frozen=True)
class SampleComparison:
    """The continuations of both models for one prompt, and the reference from the data."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class Comparison:
    """The base model and the fine-tuned model."""

    losses: list[LossComparison]
    answers: list[SampleComparison]

    def markdown(self) -> str:
        """A section for report.md."""
        lines = ["## Before and after", "", "| perplexity | before | after |  |", "| :-- | --: | --: | :-- |"]
        for one in self.losses:
            lines.append(f"| {one.text} | {_perplexity(one.before)} | {_perplexity(one.after)} | {_loss_change(one)} |")
        for answer in self.answers:
            lines += ["", *_fenced_block("prompt", answer.prompt), *_fenced_block("wanted", answer.reference)]
            lines += [*_fenced_block("before", answer.before), *_fenced_block("after", answer.after)]
        return "\n".join(lines) + "\n"


def compare(config: TrainConfig, folder: Path, sampler: Sampler) -> Comparison:
    """Evaluate both models on the validation data and a general text, and sample from both for the same prompts.

    config: of a finished run. folder: its run folder. sampler: as for `trainer.train`.
    """
    base, data, _ = load_model_and_data(config, None)
    device, dtype = torch.device(config.device), parse_dtype(config.dtype)
    general = open_data(GENERAL_CORPUS, data.tokenizer)
    texts: dict[str, Dataset] = {f"{data.name}, held out": data} if data.val_tokens else {}
    if general.name != data.name:
        texts[f"{general.name}, not fine-tuned for"] = general
    prompts = [(config.sample_prompt, "")] if config.sample_prompt else data.prompts(NUM_PROMPTS)

    def evaluate(model: GPT) -> tuple[list[float], list[str]]:
        model = model.to(device).eval()
        losses = []
        for text in texts.values():
            block = min(config.block_size, model.config.block_size)
            losses.append(mean_loss(model, text.validation_batches(config.batch_size, block, MAX_TOKENS), dtype))
        answers = []
        for prompt, _ in prompts:
            text = sampler(model, data.tokenizer, prompt, config.sample_tokens) if config.sample_tokens else prompt
            answers.append(text.removeprefix(prompt))
        return losses, answers

    losses, answers = evaluate(base)
    del base  # frees its memory before the other model is loaded
    losses_after, answers_after = evaluate(load(folder / "model")[0])
    return Comparison(
        [LossComparison(*values) for values in zip(texts, losses, losses_after, strict=True)],
        [SampleComparison(*p, before, after) for p, before, after in zip(prompts, answers, answers_after, strict=True)],
    )


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700)):,.2f}"


def _loss_change(losses: LossComparison) -> str:
    change = math.expm1(min(losses.after - losses.before, 700))
    if abs(change) < 0.005:
        return "the same"
    if change >= 1:
        return f"{change + 1:,.3g} times as high"
    return f"{abs(change):.0%} {'lower' if change < 0 else 'higher'}"


def _fenced_block(name: str, text: str) -> list[str]:
    """Any text as a fenced Markdown block under its name."""
    text = text.strip("\n")
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{name}:", "", fence + "text", text, fence, ""] if text else []
