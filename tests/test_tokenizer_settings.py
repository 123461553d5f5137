"""The files beside a vocabulary: added tokens, named special tokens and options give the ids of transformers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gpt2
from gpt2.errors import ModelFilesError, UnsupportedTokenizer, UserError
from gpt2.generation.text import encode_prompt
from gpt2.model import GPTConfig
from gpt2.tokenizer import BPETokenizer, Tokenizer, get_tokenizer, load_tokenizer, train_bpe
from gpt2.vocabulary import END_OF_TEXT
from tests.helpers.transformers_reference import random_model

TEXTS = ["the cat sat on the mat", " the dog's [PAD]log", "<|user|>the\n\ncat</s>", "a WORD and another", ""]
SIZE = 290
WORDS = ["the cat sat on the mat, and the dog's log is 12 or 345 años old — naïve 🙂\n" * 30]


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return train_bpe(WORDS, SIZE)


@pytest.fixture
def folder(bpe: BPETokenizer, tmp_path: Path) -> Path:
    """A saved tokenizer without settings, in a model folder."""
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    return tmp_path


def write(folder: Path, name: str, **values: Any) -> None:
    (folder / name).write_text(json.dumps(values))


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((folder / name).read_text(encoding="utf-8"))
    change(value)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def token(text: str, **options: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": text, **plain, **options}


def assert_ids_of_transformers(folder: Path) -> Tokenizer:
    """The same ids in the folder as it is, and in what is saved of it."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    assert ours is not None
    again = folder / "again"
    again.mkdir()
    ours.save(again)
    (again / "config.json").write_text('{"model_type": "gpt2"}')
    saved, theirs_again = load_tokenizer(again), AutoTokenizer.from_pretrained(again)
    assert saved is not None
    assert saved.fingerprint == ours.fingerprint
    for text in filter(None, TEXTS):
        expected = theirs(text)["input_ids"]
        assert encode_prompt(ours, text) == expected
        assert encode_prompt(saved, text) == expected
        assert theirs_again(text)["input_ids"] == expected
    return ours


def added_tokens_json(folder: Path) -> None:
    write(folder, "added_tokens.json", **{"[PAD]": SIZE + 1, "WORD": SIZE})
    write(folder, "special_tokens_map.json", pad_token="[PAD]")


def added_tokens_decoder(folder: Path) -> None:
    tokens = {str(SIZE - 1): token(END_OF_TEXT), str(SIZE): token("<|user|>")}
    tokens[str(SIZE + 1)] = token("WORD", special=False)
    write(folder, "tokenizer_config.json", added_tokens_decoder=tokens, tokenizer_class="GPT2Tokenizer")


def pad_in_the_map(folder: Path) -> None:
    write(folder, "special_tokens_map.json", pad_token=token("[PAD]"), eos_token=END_OF_TEXT)


def pad_and_eos_in_the_config(folder: Path) -> None:
    write(folder, "tokenizer_config.json", pad_token="[PAD]", eos_token="</s>", additional_special_tokens=["<|user|>"])


def prefix_space(folder: Path) -> None:
    write(folder, "tokenizer_config.json", add_prefix_space=True, tokenizer_class="GPT2Tokenizer")


def prefix_space_in_vain(folder: Path) -> None:
    write(folder, "tokenizer_config.json", add_prefix_space=True, tokenizer_class="PreTrainedTokenizerFast")


def bos(folder: Path) -> None:
    write(folder, "tokenizer_config.json", add_bos_token=True, tokenizer_class="GPT2Tokenizer")


@pytest.mark.parametrize("complete", [True, False], ids=["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize(
    "change",
    [added_tokens_json, added_tokens_decoder, pad_in_the_map, pad_and_eos_in_the_config, prefix_space, bos],
    ids=lambda change: change.__name__,
)
def test_ids_are_those_of_transformers(change: Callable[[Path], None], complete: bool, folder: Path) -> None:
    change(folder)
    if not complete:
        (folder / "tokenizer.json").unlink()
    ours = assert_ids_of_transformers(folder)
    assert (ours.prompt_prefix == (SIZE - 1,)) == (change is bos and not complete)
    if change is pad_and_eos_in_the_config:
        assert ours.special_tokens["</s>"] in ours.end_tokens


def test_prefix_space_is_an_option_of_gpt2s_class_only(folder: Path) -> None:
    prefix_space_in_vain(folder)
    assert_ids_of_transformers(folder)


def test_a_post_processor_with_the_first_token(folder: Path) -> None:
    post = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    post["single"] = [{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    post["pair"] = [*post["single"], {"Sequence": {"id": "B", "type_id": 1}}]
    post["special_tokens"] = {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [SIZE - 1], "tokens": [END_OF_TEXT]}}
    edit(folder, "tokenizer.json", lambda spec: spec.update(post_processor=post))
    ours = assert_ids_of_transformers(folder)
    assert ours.encode("the") == encode_prompt(ours, "the")[1:]


def test_another_end_of_text(folder: Path) -> None:
    """`</s>` in place of <|endoftext|>, in the vocabulary and by name."""
    edit(folder, "tokenizer.json", lambda spec: spec["added_tokens"][0].update(content="</s>"))
    edit(folder, "tokenizer.json", lambda spec: spec["model"]["vocab"].update({"</s>": SIZE - 1}))
    edit(folder, "tokenizer.json", lambda spec: spec["model"]["vocab"].pop(END_OF_TEXT))
    with pytest.raises(UnsupportedTokenizer, match="no file names an eos_token"):
        load_tokenizer(folder)
    write(folder, "tokenizer_config.json", eos_token="</s>", bos_token="</s>", unk_token="</s>")
    ours = assert_ids_of_transformers(folder)
    assert (ours.end_of_text, ours.end_tokens, ours.vocab_size) == (SIZE - 1, (SIZE - 1,), SIZE)


def test_a_hole_in_the_ids_is_filled(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda spec: spec["added_tokens"].append({"id": SIZE + 2, **token("[PAD]")}))
    edit(folder, "tokenizer.json", lambda spec: spec["model"]["vocab"].update({"[PAD]": SIZE + 2}))
    ours = assert_ids_of_transformers(folder)
    assert (ours.vocab_size, ours.special_tokens["[PAD]"]) == (SIZE + 3, SIZE + 2)


@pytest.mark.parametrize("ids", [{"[PAD]": 2**40}, {"[PAD]": -1}, {"[PAD]": 70_000_000}, {"[PAD]": "x"}, {"": 5}])
def test_ids_that_cannot_be(ids: dict[str, Any], folder: Path) -> None:
    write(folder, "added_tokens.json", **ids)
    with pytest.raises(ModelFilesError, match=r"cannot use .*added_tokens\.json") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"pad_token": 5, "x": "y"}', "[" * 100_000])
def test_a_broken_file_is_one_line(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ModelFilesError, match=f"cannot use .*{name}: ") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json"])
def test_a_link_out_of_the_folder_is_refused(name: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("secret") / "file"
    secret.write_text("{}")
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match=f"{name} is a link to a file outside its folder"):
        load_tokenizer(folder)


def unigram(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda spec: spec["model"].update(type="Unigram", vocab=[["a", -1.0]]))


def word_piece(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda spec: spec["model"].update(type="WordPiece"))


def only_vocab_txt(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    (folder / "vocab.txt").write_text("[UNK]\na\n")


def larger_than_the_model(folder: Path) -> None:
    train_bpe(WORDS, 300).save(folder)


@pytest.mark.parametrize("change", [unigram, word_piece, only_vocab_txt, larger_than_the_model])
def test_a_model_is_loaded_without_a_tokenizer_that_is_not_supported(
    change: Callable[[Path], None], bpe: BPETokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = GPTConfig(vocab_size=SIZE, block_size=8, n_layer=1, n_head=2, n_embd=16)
    gpt2.save(random_model(config), bpe, tmp_path)
    change(tmp_path)
    model, tokenizer = gpt2.load(tmp_path)
    assert model.config == config
    assert tokenizer is None
    (line,) = caplog.messages
    assert line.startswith("the model is loaded without its tokenizer: ")


@pytest.mark.parametrize("file", ["spiece.model", "vocab.txt"])
def test_another_tokenizer_is_not_replaced_by_openais(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    config = GPTConfig(vocab_size=50257, block_size=8, n_layer=1, n_head=1, n_embd=4)
    gpt2.save(random_model(config), None, tmp_path)
    (tmp_path / file).write_bytes(b"anything")
    assert gpt2.load(tmp_path)[1] is None
    assert "pip install 'plain-gpt2[sentencepiece]'" in caplog.text or file == "vocab.txt"


# SentencePiece


def train_sentencepiece(folder: Path, **options: Any) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [f"{word} the number {i} 猫が座った" for i, word in enumerate(dir(str) + dir(int) + dir(Path))]
    text = folder / "text.txt"
    text.write_text("\n".join(lines), encoding="utf-8")
    settings = {
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "model_type": "unigram",
        "minloglevel": 2,
        "pad_id": 3,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spiece"), **{**settings, **options}
    )
    text.unlink()
    (folder / "spiece.vocab").unlink()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write(folder, "tokenizer_config.json", tokenizer_class="T5Tokenizer", extra_ids=0, **names)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_sentencepiece(model_type: str, tmp_path: Path) -> None:
    import sentencepiece

    train_sentencepiece(tmp_path, model_type=model_type, byte_fallback=True)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    config = GPTConfig(vocab_size=processor.get_piece_size(), block_size=32, n_layer=1, n_head=2, n_embd=16)
    gpt2.save(random_model(config), None, tmp_path / "model")
    for name in ("spiece.model", "tokenizer_config.json"):
        (tmp_path / name).rename(tmp_path / "model" / name)
    model, tokenizer = gpt2.load(tmp_path / "model")
    assert tokenizer is not None
    for text in ("the cat sat", "猫が座った。", "日本 \U0001f642  x", ""):
        ids = tokenizer.encode(text)
        assert ids == processor.encode(text)
        assert tokenizer.decode(ids).removeprefix(" ") == processor.decode(ids)
    assert tokenizer.encode("the</s>", allow_special=True)[-1] == processor.eos_id() == tokenizer.end_of_text
    assert len(gpt2.generate(model, tokenizer, "the cat", max_new_tokens=4)) == 1
    gpt2.save(model, tokenizer, tmp_path / "again")
    again = gpt2.load(tmp_path / "again")[1]
    assert again is not None
    assert again.fingerprint == tokenizer.fingerprint
    assert again.special_tokens == tokenizer.special_tokens


def test_a_broken_sentencepiece_model_is_one_line(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path)
    whole = (tmp_path / "spiece.model").read_bytes()
    for broken in (b"", b"no such thing", whole[: len(whole) // 2]):
        (tmp_path / "spiece.model").write_bytes(broken)
        with pytest.raises(ModelFilesError, match=r"spiece\.model") as error:
            load_tokenizer(tmp_path)
        assert "\n" not in str(error.value)


def test_gpt2s_own_vocabulary_with_a_pad_token_beyond_the_model(gpt2_vocabulary: None, tmp_path: Path) -> None:
    config = GPTConfig(vocab_size=50257, block_size=8, n_layer=1, n_head=1, n_embd=4)
    gpt2.save(random_model(config), get_tokenizer("gpt2"), tmp_path)
    edit(tmp_path, "tokenizer_config.json", lambda raw: raw.update(pad_token="[PAD]"))
    tokenizer = gpt2.load(tmp_path)[1]
    assert tokenizer is not None
    assert (tokenizer.name, tokenizer.vocab_size) == ("gpt2", 50257)
    gpt2.save(random_model(replace(config, vocab_size=50258)), get_tokenizer("gpt2"), tmp_path)
    edit(tmp_path, "tokenizer_config.json", lambda raw: raw.update(pad_token="[PAD]"))
    tokenizer = gpt2.load(tmp_path)[1]
    assert tokenizer is not None
    assert tokenizer.special_tokens["[PAD]"] == 50257
