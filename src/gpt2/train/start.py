"""What a run begins with: the model, what of it is learned, the data as its tokens, and what the run will leave."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gpt2.data.dataset import Dataset
from gpt2.data.instruct import InstructData, is_instruct, open_instruct
from gpt2.data.prepare import open_data
from gpt2.embeddings import extend_vocabulary
from gpt2.errors import UserError
from gpt2.files import path_of
from gpt2.lora import LoRAConfig, attach, base_fingerprint, load_into, read_adapter
from gpt2.model import GPT
from gpt2.runtime import seed_everything
from gpt2.templates import Template, find_template, get_template
from gpt2.tokenizer import Tokenizer, get_tokenizer, load_tokenizer, with_special_tokens, with_symbols
from gpt2.train.config import TrainConfig
from gpt2.train.product import Product
from gpt2.weights import find_model, load, model_of


class Start(NamedTuple):
    """A run before its first step, or before the optimizers' state is put in."""

    model: GPT
    data: Dataset
    product: Product


def start(config: TrainConfig, checkpoint: Path | None) -> Start:
    """Begin as `config` says, with the weights of a checkpoint where there is one.

    Raises UserError for data, models and settings that do not go together.
    """
    if checkpoint is not None and not config.lora_rank:
        folder = checkpoint / "model"
    else:
        folder = find_model(config.init_from) if config.init_from else None
    template = get_template(config.template) if config.template else find_template(folder) if folder else None
    spoken: str | Tokenizer | None = config.tokenizer
    if config.init_from is not None and folder is not None:
        spoken = _tokenizer_of(folder, config, template, fresh=checkpoint is None)
    data = open_dataset(config, spoken, template)
    seed_everything(config.seed)
    vocab_size = data.tokenizer.vocab_size
    model = _given_model(config, folder, vocab_size) if folder else GPT(config.model_config(vocab_size))
    if isinstance(data, InstructData):
        template = template or Template()
    product = Product(model.config, data.tokenizer, template)
    if config.lora_rank:
        assert config.init_from is not None
        assert folder is not None
        lora = lora_config(config)
        name = str(folder.resolve()) if path_of(config.init_from).exists() else config.init_from
        product = replace(product, lora=lora, base=name, base_fingerprint=base_fingerprint(model))
        attach(model, lora)
        if checkpoint is not None:
            _load_adapter(model, checkpoint, product.base_fingerprint)
    if config.freeze:
        _freeze(model, config.freeze)
    return Start(model, data, product)


def open_dataset(config: TrainConfig, tokenizer: str | Tokenizer | None, template: Template | None) -> Dataset:
    """The data of a run, as a tokenizer's tokens: rows of prompts and answers, or text."""
    if not is_instruct(config.data, config.columns):
        return replace(open_data(config.data, tokenizer, config.columns), separate=config.separate_documents)
    return open_instruct(
        config.data,
        get_tokenizer(tokenizer or "gpt2") if isinstance(tokenizer, str | None) else tokenizer,
        template or Template(),
        columns=config.columns,
        mask_prompt=config.mask_prompt,
    )


def lora_config(config: TrainConfig) -> LoRAConfig:
    """The adapters that a run is to learn."""
    targets = tuple(target.strip() for target in config.lora_targets.split(",") if target.strip())
    return LoRAConfig(config.lora_rank, config.lora_alpha or 2.0 * config.lora_rank, config.lora_dropout, targets)


def _tokenizer_of(
    folder: Path, config: TrainConfig, template: Template | None, *, fresh: bool
) -> str | Tokenizer | None:
    """What to tokenize with for a model that is given: its own tokenizer; only without one, what was asked for.

    fresh: the tokens that are to be added to it have to be added.
    """
    own = load_tokenizer(folder)
    if own is not None and not fresh:
        return own
    symbols = [token for token in (config.add_tokens or "").split(",") if token]
    if own is None and not symbols and template is None:
        return config.tokenizer
    tokenizer = own or get_tokenizer(config.tokenizer or "gpt2")
    marks = template.missing_tokens(tokenizer) if template else []
    if marks and (config.lora_rank or config.freeze):
        raise UserError(
            f"the template's {marks[0]} is no token of the model, and would have to be learned: "
            "leave --lora-rank and --freeze out, or take --template plain"
        )
    tokenizer = with_special_tokens(tokenizer, marks) if marks else tokenizer
    return with_symbols(tokenizer, symbols) if symbols else tokenizer


def _given_model(config: TrainConfig, folder: Path, vocab_size: int) -> GPT:
    """The model in a folder, with this run's dropout, and with as many tokens as there are."""
    given, own = load(folder)
    own_config = replace(given.config, dropout=config.dropout, embd_dropout=None, attn_dropout=None)
    model = model_of(own_config, dict(given.named_parameters())).train()
    if own is not None and vocab_size > own.vocab_size:  # there are new tokens
        return extend_vocabulary(model, vocab_size, own.vocab_size)
    return model


def _load_adapter(model: GPT, checkpoint: Path, base: str) -> None:
    adapter = read_adapter(checkpoint / "adapter")
    if adapter.base_fingerprint != base:
        raise UserError(f"{checkpoint} has an adapter for {adapter.base}, which has changed since")
    load_into(model, adapter)


def _freeze(model: GPT, blocks: int) -> None:
    """Keep the embeddings, and with them a tied head, and the first blocks as they are."""
    layers = model.transformer.h
    if blocks > len(layers):
        raise UserError(f"--freeze {blocks} is more than the model's {len(layers)} blocks")
    for part in (model.transformer.wte, model.transformer.wpe, *layers[:blocks]):
        part.requires_grad_(False)
