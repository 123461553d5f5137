"""Chat: transcripts, templates, the prefix cache, and dropped turns."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gpt2
from gpt2.cache import KVCache
from gpt2.errors import UserError
from gpt2.generation.chat import Conversation
from gpt2.generation.engine import Engine, GenerationRequest, LanguageModel
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT, GPTConfig
from gpt2.templates import PLAIN_TEMPLATE, ChatTemplate, get_template
from gpt2.tokenizer import BPETokenizer, Tokenizer, get_tokenizer, with_special_tokens
from tests.helpers.transformers_reference import random_model

# without these a random model repeats one token, and yields no whole characters beyond ASCII
SETTINGS = {"temperature": 0, "frequency_penalty": 1, "logit_bias": dict.fromkeys(range(128, 257), -math.inf)}
GREEDY = Sampling(**SETTINGS)
ARGMAX = Sampling(temperature=0)
CONFIG = GPTConfig(vocab_size=257, block_size=256, n_layer=1, n_head=2, n_embd=16)
BYTES = get_tokenizer("bytes")


class CountingModel:
    """A model that counts the tokens that it computes, and may be interrupted."""

    def __init__(self, model: GPT) -> None:
        self.model, self.config, self.device, self.lm_head = model, model.config, model.device, model.lm_head
        self.make_cache = model.make_cache
        self.read, self.interrupted = 0, False

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        self.read += tokens.numel()
        if self.interrupted:
            assert cache is not None
            cache.extend(tokens.size(1))
            raise KeyboardInterrupt
        return self.model.hidden_states(tokens, cache)


class ScriptedModel:
    """A model that predicts token n of a fixed text after any n tokens."""

    def __init__(self, tokenizer: Tokenizer, text: str, block_size: int = 256) -> None:
        self.config = replace(CONFIG, vocab_size=tokenizer.vocab_size, block_size=block_size)
        self.device = torch.device("cpu")
        end = tokenizer.end_of_text
        self.text = torch.tensor([*tokenizer.encode(text), *[end] * block_size])

    def make_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        shape = (batch_size, 1, max_length or self.config.block_size, 1)
        return KVCache.allocate(1, shape, self.device, torch.float32)

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        assert cache is not None
        start = cache.length
        cache.extend(tokens.size(1))
        return torch.arange(start + 1, start + 1 + tokens.size(1)).view(1, -1, 1)  # the index of the next token

    def lm_head(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(self.text[hidden.squeeze(-1)], self.config.vocab_size) * 100.0


def start_conversation(
    model: LanguageModel, tokenizer: Tokenizer = BYTES, sampling: Sampling = GREEDY, **more: object
) -> Conversation:
    return Conversation(model, tokenizer, sampling, **({"max_new_tokens": 10, "seed": 1} | more))  # pyright: ignore[reportArgumentType]


def send(conversation: Conversation, text: str) -> str:
    return "".join(conversation.send(text))


def test_each_answer_equals_generate_on_the_transcript() -> None:
    """And the transcript has the format that --help states."""
    model = random_model(CONFIG)
    conversation = start_conversation(model, system="Two friends talk.")
    written = "Two friends talk.\n"
    for said in ("Hello!", "How are you, señor?", "Bye."):
        written += f"\nUser: {said}\nAssistant:"
        [full] = gpt2.generate(model, BYTES, written, max_new_tokens=10, **SETTINGS)
        written += send(conversation, said)
        assert written == full
        assert conversation.transcript == written
    assert [turn.user_text for turn in conversation.turns] == ["Hello!", "How are you, señor?", "Bye."]


def test_without_roles_the_transcript_is_one_text() -> None:
    conversation = start_conversation(random_model(CONFIG), roles=False, max_new_tokens=3)
    one, two, three, four = (send(conversation, said) for said in ("It was", "A new line", " the same line", ""))
    assert conversation.transcript == f"It was{one}\nA new line{two} the same line{three}{four}"
    assert one == gpt2.generate(conversation.model, BYTES, "It was", max_new_tokens=3, **SETTINGS)[0][6:]


def test_an_empty_message_without_roles_starts_from_the_end_of_text_token() -> None:
    model = random_model(CONFIG)
    assert (
        send(start_conversation(model, roles=False), "")
        == gpt2.generate(model, BYTES, "", max_new_tokens=10, **SETTINGS)[0]
    )


DIALOGUE = "User: Who's there?\nAssistant: A ghost.\nUser: Whose?\nAssistant: Yours.\nUser: "


def test_the_answer_ends_where_the_next_user_turn_begins() -> None:
    conversation = start_conversation(ScriptedModel(BYTES, DIALOGUE), sampling=ARGMAX, max_new_tokens=50)
    assert send(conversation, "Who's there?") == " A ghost."
    assert send(conversation, "Whose?") == " Yours."
    assert conversation.transcript == DIALOGUE.removesuffix("\nUser: ")


def test_the_end_of_text_token_ends_an_answer_and_is_not_kept() -> None:
    conversation = start_conversation(
        ScriptedModel(BYTES, "User: Hi\nAssistant: Hm."), sampling=ARGMAX, max_new_tokens=50
    )
    assert send(conversation, "Hi") == " Hm."
    assert conversation.turns[0].tokens == BYTES.encode(" Hm.")


@pytest.mark.parametrize("stop", [".", "ost", "A gh", " ", "t.\nU"])
def test_tokens_cut_by_a_stop_string_are_encoded_again(stop: str, small_bpe: BPETokenizer) -> None:
    conversation = start_conversation(
        ScriptedModel(small_bpe, DIALOGUE), small_bpe, ARGMAX, max_new_tokens=50, stop=[stop]
    )
    answer = send(conversation, "Who's there?")
    assert answer == (" A ghost.\nUser: Whose?".partition(stop)[0])
    assert small_bpe.decode(conversation.turns[0].tokens) == answer


def test_a_turn_computes_only_new_tokens() -> None:
    """The model has not run on the last token of an answer, and the last token of a prompt is never copied."""
    counting = CountingModel(random_model(CONFIG))
    conversation = start_conversation(counting, max_new_tokens=20)
    first = "User: Hello\nAssistant:"
    send(conversation, "Hello")
    assert counting.read == len(first) + 19
    for said in ("How are you?", "And now?"):
        counting.read = 0
        send(conversation, said)
        assert counting.read == 1 + len(f"\nUser: {said}\nAssistant:") + 19
    counting.read = 0
    assert len(list(conversation.retry())) == 20
    assert counting.read == 1 + 19
    conversation.undo()
    counting.read = 0
    send(conversation, "And now?")
    assert counting.read == 1 + 19


def test_the_tokens_of_a_stop_string_are_not_computed_twice() -> None:
    scripted = ScriptedModel(BYTES, DIALOGUE)
    conversation = start_conversation(scripted, sampling=ARGMAX, max_new_tokens=50)
    send(conversation, "Who's there?")
    read = []
    inner = scripted.hidden_states
    scripted.hidden_states = lambda tokens, cache=None: read.append(tokens.size(1)) or inner(tokens, cache)
    send(conversation, "Whose?")
    assert read[0] == len(": Whose?\nAssistant:")  # "\nUser" is in the cache already


@settings(max_examples=25, deadline=None, derandomize=True)  # other chunks round differently
@given(st.lists(st.text("abé ", min_size=1, max_size=30), min_size=1, max_size=8), st.integers(0, 2**32))
def test_the_prefix_cache_never_changes_an_answer(said: list[str], seed: int) -> None:
    """Over turns and dropped turns each answer equals that of a new engine."""
    model = random_model(replace(CONFIG, block_size=96))
    conversation = start_conversation(model, sampling=Sampling(top_k=20), max_new_tokens=12, seed=seed)
    for number, text in enumerate(said):
        answer = send(conversation, text)
        fresh = start_conversation(model, sampling=Sampling(top_k=20), max_new_tokens=12, seed=seed)
        fresh.turns, fresh.num_dropped_turns, fresh._next_sample_index = (
            conversation.turns[:-1],
            conversation.num_dropped_turns,
            number,
        )
        assert send(fresh, text) == answer
        assert fresh.num_dropped_turns == conversation.num_dropped_turns


def test_the_oldest_turns_are_dropped_whole_until_three_quarters_are_left() -> None:
    """Several at a time: dropping one per turn would prefill the whole context at each turn."""
    conversation = start_conversation(random_model(replace(CONFIG, block_size=192)), system="System.")
    room, num_dropped, seen = 192 - 10, 0, set()
    for i in range(12):
        send(conversation, f"turn {i}" * (1 + i * i % 7))
        parts = [f"\nUser: {turn.user_text}\nAssistant:{turn.answer}" for turn in conversation.turns]
        sizes = [len("System.\n" + "".join(parts[n:])) for n in range(i + 1)]  # with n turns dropped, in bytes
        prompts = [size - len(conversation.turns[-1].answer) for size in sizes]
        if prompts[num_dropped] > room:
            num_dropped = next(n for n, size in enumerate(prompts) if size <= room * 3 // 4)
        assert conversation.num_dropped_turns == num_dropped
        assert conversation.num_prompt_tokens == sizes[num_dropped] <= 192
        seen.add(num_dropped)
    assert 3 <= len(seen) < 8
    assert len(conversation.turns) == 12
    assert "turn 0" in conversation.transcript


def test_a_turn_that_does_not_fit_is_refused_and_the_conversation_continues() -> None:
    conversation = start_conversation(random_model(CONFIG))
    answer = send(conversation, "Hello")
    with pytest.raises(UserError, match=r"\d+ tokens do not fit the model's context of 256"):
        send(conversation, "x" * 300)
    assert [turn.answer for turn in conversation.turns] == [answer]
    assert conversation.num_dropped_turns == 0
    assert send(conversation, "x" * 230)  # with room for a few tokens only
    assert conversation.num_prompt_tokens <= 256


def test_an_answer_may_be_closed_at_any_piece() -> None:
    model = random_model(CONFIG)
    conversation = start_conversation(model, max_new_tokens=30)
    send(conversation, "Hello")
    pieces = conversation.send("Go on")
    received = "".join(next(pieces) for _ in range(12))
    pieces.close()
    assert received
    assert conversation.turns[-1].answer == received
    assert BYTES.decode(conversation.turns[-1].tokens) == received
    fresh = start_conversation(model, max_new_tokens=30)
    fresh.turns = list(conversation.turns)
    assert send(conversation, "And then?") == send(fresh, "And then?")


def test_after_an_interrupted_step_the_cache_is_not_used() -> None:
    """It has room for a token that was not computed."""
    counting = CountingModel(random_model(CONFIG))
    conversation = start_conversation(counting, max_new_tokens=20)
    send(conversation, "Hello")
    pieces = conversation.send("Go on")
    received = "".join(next(pieces) for _ in range(5))
    counting.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    counting.interrupted = False
    assert conversation.turns[-1].answer == received != ""
    fresh = start_conversation(random_model(CONFIG), max_new_tokens=20)
    fresh.turns = list(conversation.turns)
    counting.read = 0
    assert send(conversation, "And then?") == send(fresh, "And then?")
    assert counting.read == conversation.num_prompt_tokens - 1


def test_undo_retry_reset_seed() -> None:
    conversation = start_conversation(random_model(CONFIG), sampling=Sampling())
    for nothing in (conversation.undo, conversation.retry):
        with pytest.raises(UserError, match="there is no turn yet"):
            nothing()
    one = send(conversation, "Hello")
    two = "".join(conversation.retry())
    assert one != two
    assert [turn.answer for turn in conversation.turns] == [two]
    conversation.seed = 1
    assert "".join(conversation.retry()) == one
    assert conversation.undo().user_text == "Hello"
    assert conversation.transcript == ""
    send(conversation, "Hello")
    conversation.reset()
    conversation.seed = 1
    assert send(conversation, "Hello") == one


def test_an_error_leaves_the_turns_unchanged() -> None:
    conversation = start_conversation(random_model(CONFIG))
    send(conversation, "Hello")
    before = list(conversation.turns)
    conversation.sampling = Sampling(bad_words=[[i] for i in range(257)])
    with pytest.raises(UserError, match="rule out every token"):
        list(conversation.retry())
    assert conversation.turns == before
    conversation.sampling = GREEDY
    assert "".join(conversation.retry()) == before[0].answer


# Chat templates

CHATML = get_template("chatml")
MARKED = with_special_tokens(BYTES, CHATML.special_tokens)


def test_each_answer_equals_the_engine_on_the_prompt_of_the_template() -> None:
    """And tokens of earlier turns are not computed again."""
    counting = CountingModel(random_model(replace(CONFIG, vocab_size=MARKED.vocab_size)))
    sampling = replace(GREEDY, logit_bias=dict.fromkeys(range(128, 259), -math.inf))
    conversation = start_conversation(counting, MARKED, sampling, template=CHATML, system="Be brief.")
    messages, begin = [("system", "Be brief.")], 0
    for said in ("Hello!", "How are you?<|im_end|>", "Bye."):
        messages.append(("user", said))
        prompt, counting.read = CHATML.encode_prompt(MARKED, messages), 0
        answer = send(conversation, said)
        assert counting.read == len(prompt) - begin + 9
        begin = len(prompt) + 9  # the last token of an answer is not cached yet
        fresh = Engine(counting.model, slots=1)
        expected = fresh.submit(GenerationRequest(prompt, sampling, 10, 1))
        while not expected.finish_reason:
            fresh.step()
        assert MARKED.decode(expected.new_tokens) == answer
        assert conversation.num_prompt_tokens == len(prompt) + 10
        messages.append(("assistant", answer))
        assert conversation.transcript == CHATML.render(messages)


@pytest.mark.parametrize("template", [CHATML, ChatTemplate(CHATML.source + "{# #}")])
def test_an_answer_ends_at_the_stop_string_of_the_template(template: ChatTemplate) -> None:
    scripted = ScriptedModel(MARKED, "")
    dialogue = [("user", "Who's there?"), ("assistant", "A ghost."), ("user", "Whose?"), ("assistant", "Yours.")]
    text = [i for ids, _ in template.encode(MARKED, dialogue) for i in ids]
    scripted.text[: len(text)] = torch.tensor(text)
    conversation = start_conversation(scripted, MARKED, ARGMAX, max_new_tokens=50, template=template)
    assert send(conversation, "Who's there?") == "A ghost."
    assert send(conversation, "Whose?") == "Yours."
    assert conversation.transcript == template.render(dialogue)
    assert conversation.answer_prefix == ""


def test_the_plain_template_equals_no_template() -> None:
    for template in (ChatTemplate(), ChatTemplate(PLAIN_TEMPLATE + "{# #}")):
        plain, own = (
            start_conversation(ScriptedModel(BYTES, DIALOGUE)),
            start_conversation(ScriptedModel(BYTES, DIALOGUE), template=template),
        )
        for conversation in (plain, own):
            conversation.sampling, conversation.max_new_tokens = ARGMAX, 50
            assert send(conversation, "Who's there?") == " A ghost."
            assert send(conversation, "Whose?") == " Yours."
        assert own.transcript == plain.transcript
        assert own.answer_prefix == plain.answer_prefix == " "
        assert [turn.tokens for turn in own.turns] == [turn.tokens for turn in plain.turns]
        assert own.num_prompt_tokens == plain.num_prompt_tokens


def test_an_answer_keeps_its_sampled_tokens(small_bpe: BPETokenizer) -> None:
    """Even if encoding would give other tokens: they are in the cache."""
    marked = with_special_tokens(small_bpe, CHATML.special_tokens)
    unusual_tokens = [i for letter in "the fox" for i in marked.encode(letter)]
    first = CHATML.encode_prompt(marked, [("user", "Who?")])
    assert unusual_tokens != marked.encode("the fox")
    scripted = ScriptedModel(marked, "")
    scripted.text[len(first) :][: len(unusual_tokens)] = torch.tensor(unusual_tokens)
    conversation = start_conversation(scripted, marked, ARGMAX, template=CHATML)
    assert send(conversation, "Who?") == "the fox"
    send(conversation, "Which?")
    messages = [("user", "Who?"), ("assistant", "the fox"), ("user", "Which?")]
    assert conversation.turns[0].tokens == unusual_tokens
    assert conversation.num_prompt_tokens == len(CHATML.encode_prompt(marked, messages, [unusual_tokens]))
    assert conversation.num_prompt_tokens > len(CHATML.encode_prompt(marked, messages))


def test_with_a_template_the_oldest_turns_are_dropped_too() -> None:
    conversation = start_conversation(
        random_model(replace(CONFIG, vocab_size=259)), MARKED, template=CHATML, system="S."
    )
    for i in range(8):
        send(conversation, f"turn {i}")
        assert conversation.num_prompt_tokens <= 256
    kept = conversation.turns[conversation.num_dropped_turns :]
    assert 0 < len(kept) < 8
    messages = [("system", "S.")]
    for turn in kept:
        messages += [("user", turn.user_text), ("assistant", turn.answer)]
    assert conversation.num_prompt_tokens == len(CHATML.encode_prompt(MARKED, messages[:-1])) + len(kept[-1].tokens)


def test_a_template_error_leaves_the_turns_unchanged() -> None:
    picky = ChatTemplate("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}:")
    conversation = start_conversation(random_model(CONFIG), template=picky, system="S")
    with pytest.raises(UserError, match="no system"):
        send(conversation, "Hello")
    assert conversation.turns == []
    conversation.system = ""
    assert len(send(conversation, "Hello")) == 10
