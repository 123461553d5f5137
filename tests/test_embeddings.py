"""Extending the vocabulary keeps the known tokens, and transformers reads the result."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gpt2
from gpt2.embeddings import extend_vocabulary
from gpt2.errors import UserError
from gpt2.model import GPTConfig
from gpt2.tokenizer import get_tokenizer, with_special_tokens
from tests.helpers.transformers_reference import random_model

CONFIG = GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=16)
TOKENS = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_known_rows_are_unchanged_and_new_rows_are_near_the_mean(tied: bool) -> None:
    model = random_model(replace(CONFIG, tie_word_embeddings=tied))
    before = [p.clone() for p in model.parameters()]
    torch.manual_seed(3)
    more = extend_vocabulary(model, 300)
    assert more.config == replace(model.config, vocab_size=300)
    assert (more.lm_head.weight is more.transformer.wte.weight) == tied
    torch.testing.assert_close(more(TOKENS)[..., :257], model(TOKENS))
    for new, old in ((more.transformer.wte, model.transformer.wte), (more.lm_head, model.lm_head)):
        assert new.weight.shape == (300, 16)
        assert torch.equal(new.weight[:257], old.weight)
        assert new.weight.requires_grad
        away = (new.weight[257:] - old.weight.mean(0)) / old.weight.std(0)  # in units of the spread of each channel
        assert 0.08 < away.std() < 0.12
        assert away.abs().max() < 0.6
        assert len(new.weight.unique(dim=0)) == 300
    torch.manual_seed(3)
    assert torch.equal(extend_vocabulary(model, 300).transformer.wte.weight, more.transformer.wte.weight)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    logits = more(TOKENS)
    assert logits[..., 257:].softmax(-1).isfinite().all()
    assert (logits.softmax(-1)[..., 257:].sum(-1) < 2 * 43 / 300).all()  # close to their uniform share at most


@torch.no_grad()
def test_padding_rows_are_initialized_again() -> None:
    model = random_model(replace(CONFIG, vocab_size=320))
    more = extend_vocabulary(model, 259, num_known_tokens=257)
    assert more.config.vocab_size == 320
    assert torch.equal(more.transformer.wte.weight[:257], model.transformer.wte.weight[:257])
    assert not (more.transformer.wte.weight[257:] == model.transformer.wte.weight[257:]).any()
    for wrong in ((256, None), (300, 321), (256, 257), (300, 0)):
        with pytest.raises(UserError, match="cannot have"):
            extend_vocabulary(random_model(CONFIG), *wrong)


@torch.no_grad()
def test_transformers_reads_the_extended_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2LMHeadModel

    tokenizer = with_special_tokens(get_tokenizer("bytes"), ["<|user|>", "<|reply|>"])
    model = extend_vocabulary(random_model(CONFIG), tokenizer.vocab_size)
    folder = gpt2.save(model, tokenizer, tmp_path / "model")
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder)("<|user|>Hi<|reply|>")["input_ids"]])
    assert tokens.tolist() == [[257, 72, 105, 258]]
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
    again, same = gpt2.load(folder)
    assert same is not None
    assert same.special_tokens == tokenizer.special_tokens
    torch.testing.assert_close(again(tokens), model(tokens))
