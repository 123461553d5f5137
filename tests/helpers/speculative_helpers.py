"""Models and drafts for the tests of speculative decoding."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gpt2.cache import KVCache
from gpt2.generation.engine import Engine, GenerationRequest, LanguageModel
from gpt2.generation.speculative import Drafter, DraftModel, PromptLookup, SpeculativeDecoder
from gpt2.model import GPT, GPTConfig
from tests.helpers.transformers_reference import random_model


def context_sensitive_model(config: GPTConfig, seed: int = 0) -> GPT:
    """A random model with a strong dependence on earlier tokens and far from uniform distributions."""
    model = random_model(config, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.sub_(1)  # of mean 0, or a few tokens would be likely everywhere
            elif parameter.dim() == 2:
                parameter.mul_(12 if "attn" in name else 3)
    return model


class TrigramModel:
    """A trigram table as a language model: the next token depends on the last two. Fast, and it uses the cache."""

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        self.config, self.device = config, torch.device("cpu")
        size = config.vocab_size
        table = 2 * torch.randn(size, size, size, generator=torch.Generator().manual_seed(seed))
        self.lm_head = lambda hidden: table[hidden[..., 0], hidden[..., 1]]  # (..., 2) -> (..., V)

    def make_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        length = max_length or self.config.block_size
        return KVCache.allocate(1, (batch_size, 1, length, 1), self.device, torch.float32)

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        cache = self.make_cache(len(tokens)) if cache is None else cache
        keys, values = (tokens[:, None, :, None].float() for _ in range(2))
        kept, _ = cache.extend(tokens.size(1)).layer(0).append(keys, values)  # (B, 1, S, 1)
        text = torch.cat((torch.zeros(len(tokens), 1), kept[:, 0, :, 0]), 1).long()  # token 0 before the first
        return torch.stack((text[:, :-1], text[:, 1:]), -1)[:, -tokens.size(1) :]


def decode_without_draft(model: LanguageModel, request: GenerationRequest) -> list[int]:
    """The same request without a draft."""
    engine = Engine(model, 1)
    sequence = engine.submit(request)
    while not engine.idle:
        engine.step()
    if sequence.error:
        raise sequence.error
    return sequence.new_tokens


def speculative_decode(
    model: LanguageModel, draft: Drafter, request: GenerationRequest, longest: int = 16
) -> list[int]:
    decoder = SpeculativeDecoder(model, draft, request, longest)
    tokens = [token for tokens in decoder for token in tokens]
    assert tokens == decoder.sequence.new_tokens
    return tokens


DRAFTERS: dict[str, Callable[[GPT], Drafter]] = {
    "itself": DraftModel,
    "another": lambda model: DraftModel(context_sensitive_model(replace(model.config, n_layer=1), 5)),
    "shorter": lambda model: DraftModel(context_sensitive_model(replace(model.config, block_size=5), 5)),
    "nearly": lambda model: DraftModel(perturbed_model(model)),
    "lookup": lambda model: PromptLookup(),
    "lookup 1": lambda model: PromptLookup(1),
}


def perturbed_model(model: GPT) -> GPT:
    """The model with 5% noise on its parameters."""
    other = GPT(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.manual_seed(9)
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter, alpha=0.05)
    return other
