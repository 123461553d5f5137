"""What `gpt2 train` and `gpt2 finetune` share once the flags are parsed. It imports torch."""

from collections.abc import Callable
from dataclasses import asdict

import torch

import gpt2
from gpt2.config import TrainConfig
from gpt2.distributed.process_group import ProcessGroup, max_restarts
from gpt2.errors import ConfigError
from gpt2.generation.text import generate
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer
from gpt2.train.task_evaluation import TaskEvaluator
from gpt2.train.trainer import Sampler


def broadcast_config(
    ranks: ProcessGroup, requested: TrainConfig, make_config: Callable[[], TrainConfig]
) -> TrainConfig:
    """Broadcast the config that the main process makes: it alone looks at the run folders.

    Raises UserError where the ranks were given different flags, and for a run that torchrun could not restart.
    """
    versions = {"torch": torch.__version__, "gpt2": gpt2.__version__}
    flags = {f"--{name.replace('_', '-')}": value for name, value in asdict(requested).items()}
    ranks.assert_same_on_all_ranks(versions | flags, "start every rank with the same command")

    def make_and_check() -> TrainConfig:
        if max_restarts() and requested.resume == "never":
            raise ConfigError("torchrun --max-restarts needs --resume auto, so that a restarted run resumes")
        config = make_config().check()
        if max_restarts() and config.max_minutes:
            raise ConfigError("torchrun --max-restarts treats the end by --max-minutes as a failure: use only one")
        return config

    return ranks.broadcast_from_main(make_and_check)


def make_sampler(config: TrainConfig) -> Sampler:
    """The function with which a run generates its samples."""

    def sampler(model: GPT, tokenizer: Tokenizer, prompt: str, length: int) -> str:
        return generate(model, tokenizer, prompt, max_new_tokens=length, seed=config.seed)[0]

    return sampler


def make_evaluator(config: TrainConfig, ranks: ProcessGroup) -> TaskEvaluator | None:
    """The evaluator for --eval-tasks, with its data on every host; None without tasks. All ranks must call this.

    Raises UserError for data that is missing, before anything else is loaded.
    """
    if not config.eval_tasks or not config.data:  # without data, `train` raises its own error
        return None
    from gpt2.evaluation.training import TrainingEvaluator

    return ranks.main_process_first(lambda: TrainingEvaluator(config))
