"""What the evaluation tests share."""

import pytest
import torch

from gpt2.model import GPT, GPTConfig
from gpt2.tokenizer import BPETokenizer, train_bpe

TEXT = (
    "the quick brown fox jumps over the lazy dog and the dog sleeps in the sun. a question has an answer: yes or no. "
    "the man went to the market, and the woman stayed at home. the river runs to the sea; the sea is deep. "
) * 3


@pytest.fixture(scope="session")
def words() -> BPETokenizer:
    """A tokenizer of 340 tokens."""
    return train_bpe([TEXT], 340)


@pytest.fixture(scope="session")
def model(words: BPETokenizer) -> GPT:
    """Two layers of random weights, large enough for decisions to differ; a context of 48."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=48, vocab_size=words.vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()
