"""The conversation: what is said, what is remembered, what is read again."""

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

# a random model says one thing for ever, and no whole characters beyond ASCII, if it is let
SETTINGS = {"temperature": 0, "frequency_penalty": 1, "logit_bias": dict.fromkeys(range(128, 257), -math.inf)}
GREEDY = Sampling(**SETTINGS)
BY_HEART = Sampling(temperature=0)
CONFIG = GPTConfig(vocab_size=257, block_size=256, n_layer=1, n_head=2, n_embd=16)
BYTES = get_tokenizer("bytes")


class Watched:
    """A model that counts the tokens it reads, and may be interrupted."""

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


class Actor:
    """A model that knows a text by heart: after n tokens it says token n, whatever it has read."""

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
        return torch.arange(start + 1, start + 1 + tokens.size(1)).view(1, -1, 1)  # where the next token stands

    def lm_head(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(self.text[hidden.squeeze(-1)], self.config.vocab_size) * 100.0


def talk(
    model: LanguageModel, tokenizer: Tokenizer = BYTES, sampling: Sampling = GREEDY, **more: object
) -> Conversation:
    return Conversation(model, tokenizer, sampling, **({"max_new_tokens": 10, "seed": 1} | more))  # pyright: ignore[reportArgumentType]


def say(conversation: Conversation, text: str) -> str:
    return "".join(conversation.send(text))


def test_each_answer_is_what_generate_says_to_the_transcript() -> None:
    """And the transcript is the template that --help states."""
    model = random_model(CONFIG)
    conversation = talk(model, system="Two friends talk.")
    written = "Two friends talk.\n"
    for said in ("Hello!", "How are you, señor?", "Bye."):
        written += f"\nUser: {said}\nAssistant:"
        [full] = gpt2.generate(model, BYTES, written, max_new_tokens=10, **SETTINGS)
        written += say(conversation, said)
        assert written == full
        assert conversation.transcript == written
    assert [turn.user_text for turn in conversation.turns] == ["Hello!", "How are you, señor?", "Bye."]


def test_without_roles_it_is_one_text() -> None:
    conversation = talk(random_model(CONFIG), roles=False, max_new_tokens=3)
    one, two, three, four = (say(conversation, said) for said in ("It was", "A new line", " the same line", ""))
    assert conversation.transcript == f"It was{one}\nA new line{two} the same line{three}{four}"
    assert one == gpt2.generate(conversation.model, BYTES, "It was", max_new_tokens=3, **SETTINGS)[0][6:]


def test_an_empty_text_begins_after_the_end_of_another() -> None:
    model = random_model(CONFIG)
    assert say(talk(model, roles=False), "") == gpt2.generate(model, BYTES, "", max_new_tokens=10, **SETTINGS)[0]


PLAY = "User: Who's there?\nAssistant: A ghost.\nUser: Whose?\nAssistant: Yours.\nUser: "


def test_the_answer_ends_where_the_user_would_speak() -> None:
    conversation = talk(Actor(BYTES, PLAY), sampling=BY_HEART, max_new_tokens=50)
    assert say(conversation, "Who's there?") == " A ghost."
    assert say(conversation, "Whose?") == " Yours."
    assert conversation.transcript == PLAY.removesuffix("\nUser: ")


def test_the_end_of_text_ends_an_answer_and_is_not_remembered() -> None:
    conversation = talk(Actor(BYTES, "User: Hi\nAssistant: Hm."), sampling=BY_HEART, max_new_tokens=50)
    assert say(conversation, "Hi") == " Hm."
    assert conversation.turns[0].tokens == BYTES.encode(" Hm.")


@pytest.mark.parametrize("stop", [".", "ost", "A gh", " ", "t.\nU"])
def test_tokens_that_a_stop_string_cuts_are_spelled_anew(stop: str, small_bpe: BPETokenizer) -> None:
    conversation = talk(Actor(small_bpe, PLAY), small_bpe, BY_HEART, max_new_tokens=50, stop=[stop])
    answer = say(conversation, "Who's there?")
    assert answer == (" A ghost.\nUser: Whose?".partition(stop)[0])
    assert small_bpe.decode(conversation.turns[0].tokens) == answer


def test_a_turn_reads_no_more_than_is_new() -> None:
    """The last token of an answer was not read when it was said, and the last token of all is never copied."""
    watched = Watched(random_model(CONFIG))
    conversation = talk(watched, max_new_tokens=20)
    first = "User: Hello\nAssistant:"
    say(conversation, "Hello")
    assert watched.read == len(first) + 19
    for said in ("How are you?", "And now?"):
        watched.read = 0
        say(conversation, said)
        assert watched.read == 1 + len(f"\nUser: {said}\nAssistant:") + 19
    watched.read = 0
    assert len(list(conversation.retry())) == 20
    assert watched.read == 1 + 19
    conversation.undo()
    watched.read = 0
    say(conversation, "And now?")
    assert watched.read == 1 + 19


def test_a_stop_string_is_not_read_twice_either() -> None:
    actor = Actor(BYTES, PLAY)
    conversation = talk(actor, sampling=BY_HEART, max_new_tokens=50)
    say(conversation, "Who's there?")
    read = []
    inner = actor.hidden_states
    actor.hidden_states = lambda tokens, cache=None: read.append(tokens.size(1)) or inner(tokens, cache)
    say(conversation, "Whose?")
    assert read[0] == len(": Whose?\nAssistant:")  # "\nUser" it has read when it said it


@settings(max_examples=25, deadline=None, derandomize=True)  # reading in other pieces rounds otherwise
@given(st.lists(st.text("abé ", min_size=1, max_size=30), min_size=1, max_size=8), st.integers(0, 2**32))
def test_what_is_kept_in_the_cache_never_changes_an_answer(said: list[str], seed: int) -> None:
    """Not over turns, retries and turns taken back, nor when the oldest are dropped: each equals a fresh engine's."""
    model = random_model(replace(CONFIG, block_size=96))
    conversation = talk(model, sampling=Sampling(top_k=20), max_new_tokens=12, seed=seed)
    for number, text in enumerate(said):
        answer = say(conversation, text)
        fresh = talk(model, sampling=Sampling(top_k=20), max_new_tokens=12, seed=seed)
        fresh.turns, fresh.num_dropped_turns, fresh._next_sample_index = (
            conversation.turns[:-1],
            conversation.num_dropped_turns,
            number,
        )
        assert say(fresh, text) == answer
        assert fresh.num_dropped_turns == conversation.num_dropped_turns


def test_the_oldest_turns_are_dropped_whole_until_three_quarters_are_left() -> None:
    """Several at a time: with one dropped each turn, the whole context would be read at each turn."""
    conversation = talk(random_model(replace(CONFIG, block_size=192)), system="System.")
    room, forgotten, seen = 192 - 10, 0, set()
    for i in range(12):
        say(conversation, f"turn {i}" * (1 + i * i % 7))
        parts = [f"\nUser: {turn.user_text}\nAssistant:{turn.answer}" for turn in conversation.turns]
        sizes = [len("System.\n" + "".join(parts[n:])) for n in range(i + 1)]  # with n turns dropped, in bytes
        prompts = [size - len(conversation.turns[-1].answer) for size in sizes]
        if prompts[forgotten] > room:
            forgotten = next(n for n, size in enumerate(prompts) if size <= room * 3 // 4)
        assert conversation.num_dropped_turns == forgotten
        assert conversation.num_prompt_tokens == sizes[forgotten] <= 192
        seen.add(forgotten)
    assert 3 <= len(seen) < 8
    assert len(conversation.turns) == 12
    assert "turn 0" in conversation.transcript


def test_a_turn_that_does_not_fit_is_refused_and_the_talk_goes_on() -> None:
    conversation = talk(random_model(CONFIG))
    answer = say(conversation, "Hello")
    with pytest.raises(UserError, match=r"\d+ tokens do not fit the model's context of 256"):
        say(conversation, "x" * 300)
    assert [turn.answer for turn in conversation.turns] == [answer]
    assert conversation.num_dropped_turns == 0
    assert say(conversation, "x" * 230)  # with room for a few tokens only
    assert conversation.num_prompt_tokens <= 256


def test_an_answer_may_be_left_at_any_piece() -> None:
    model = random_model(CONFIG)
    conversation = talk(model, max_new_tokens=30)
    say(conversation, "Hello")
    pieces = conversation.send("Go on")
    heard = "".join(next(pieces) for _ in range(12))
    pieces.close()
    assert heard
    assert conversation.turns[-1].answer == heard
    assert BYTES.decode(conversation.turns[-1].tokens) == heard
    fresh = talk(model, max_new_tokens=30)
    fresh.turns = list(conversation.turns)
    assert say(conversation, "And then?") == say(fresh, "And then?")


def test_interrupted_in_the_midst_of_a_step_nothing_of_the_cache_is_believed() -> None:
    """It has made room for a token that it has not read."""
    watched = Watched(random_model(CONFIG))
    conversation = talk(watched, max_new_tokens=20)
    say(conversation, "Hello")
    pieces = conversation.send("Go on")
    heard = "".join(next(pieces) for _ in range(5))
    watched.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    watched.interrupted = False
    assert conversation.turns[-1].answer == heard != ""
    fresh = talk(random_model(CONFIG), max_new_tokens=20)
    fresh.turns = list(conversation.turns)
    watched.read = 0
    assert say(conversation, "And then?") == say(fresh, "And then?")
    assert watched.read == conversation.num_prompt_tokens - 1


def test_undo_retry_reset_seed() -> None:
    conversation = talk(random_model(CONFIG), sampling=Sampling())
    for nothing in (conversation.undo, conversation.retry):
        with pytest.raises(UserError, match="nothing has been said yet"):
            nothing()
    one = say(conversation, "Hello")
    two = "".join(conversation.retry())
    assert one != two
    assert [turn.answer for turn in conversation.turns] == [two]
    conversation.seed = 1
    assert "".join(conversation.retry()) == one
    assert conversation.undo().user_text == "Hello"
    assert conversation.transcript == ""
    say(conversation, "Hello")
    conversation.reset()
    conversation.seed = 1
    assert say(conversation, "Hello") == one


def test_what_goes_wrong_leaves_the_turns_as_they_were() -> None:
    conversation = talk(random_model(CONFIG))
    say(conversation, "Hello")
    before = list(conversation.turns)
    conversation.sampling = Sampling(bad_words=[[i] for i in range(257)])
    with pytest.raises(UserError, match="rule out every token"):
        list(conversation.retry())
    assert conversation.turns == before
    conversation.sampling = GREEDY
    assert "".join(conversation.retry()) == before[0].answer


# A template of the model's own

CHATML = get_template("chatml")
MARKED = with_special_tokens(BYTES, CHATML.special_tokens)


def test_each_answer_is_what_is_said_to_the_templates_prompt() -> None:
    """And of all that was said before, nothing is read again."""
    watched = Watched(random_model(replace(CONFIG, vocab_size=MARKED.vocab_size)))
    sampling = replace(GREEDY, logit_bias=dict.fromkeys(range(128, 259), -math.inf))
    conversation = talk(watched, MARKED, sampling, template=CHATML, system="Be brief.")
    messages, begin = [("system", "Be brief.")], 0
    for said in ("Hello!", "How are you?<|im_end|>", "Bye."):
        messages.append(("user", said))
        prompt, watched.read = CHATML.encode_prompt(MARKED, messages), 0
        answer = say(conversation, said)
        assert watched.read == len(prompt) - begin + 9
        begin = len(prompt) + 9  # the last token of an answer was not read when it was said
        fresh = Engine(watched.model, slots=1)
        expected = fresh.submit(GenerationRequest(prompt, sampling, 10, 1))
        while not expected.finish_reason:
            fresh.step()
        assert MARKED.decode(expected.new_tokens) == answer
        assert conversation.num_prompt_tokens == len(prompt) + 10
        messages.append(("assistant", answer))
        assert conversation.transcript == CHATML.render(messages)


@pytest.mark.parametrize("template", [CHATML, ChatTemplate(CHATML.source + "{# #}")])
def test_an_answer_ends_at_the_templates_mark(template: ChatTemplate) -> None:
    actor = Actor(MARKED, "")
    play = [("user", "Who's there?"), ("assistant", "A ghost."), ("user", "Whose?"), ("assistant", "Yours.")]
    text = [i for ids, _ in template.encode(MARKED, play) for i in ids]
    actor.text[: len(text)] = torch.tensor(text)
    conversation = talk(actor, MARKED, BY_HEART, max_new_tokens=50, template=template)
    assert say(conversation, "Who's there?") == "A ghost."
    assert say(conversation, "Whose?") == "Yours."
    assert conversation.transcript == template.render(play)
    assert conversation.answer_prefix == ""


def test_the_plain_transcript_as_a_template_is_the_one_without() -> None:
    for template in (ChatTemplate(), ChatTemplate(PLAIN_TEMPLATE + "{# #}")):
        plain, own = talk(Actor(BYTES, PLAY)), talk(Actor(BYTES, PLAY), template=template)
        for conversation in (plain, own):
            conversation.sampling, conversation.max_new_tokens = BY_HEART, 50
            assert say(conversation, "Who's there?") == " A ghost."
            assert say(conversation, "Whose?") == " Yours."
        assert own.transcript == plain.transcript
        assert own.answer_prefix == plain.answer_prefix == " "
        assert [turn.tokens for turn in own.turns] == [turn.tokens for turn in plain.turns]
        assert own.num_prompt_tokens == plain.num_prompt_tokens


def test_an_answer_keeps_the_tokens_it_was_said_in(small_bpe: BPETokenizer) -> None:
    """However oddly it was cut: they are in the cache."""
    marked = with_special_tokens(small_bpe, CHATML.special_tokens)
    oddly = [i for letter in "the fox" for i in marked.encode(letter)]
    first = CHATML.encode_prompt(marked, [("user", "Who?")])
    assert oddly != marked.encode("the fox")
    actor = Actor(marked, "")
    actor.text[len(first) :][: len(oddly)] = torch.tensor(oddly)
    conversation = talk(actor, marked, BY_HEART, template=CHATML)
    assert say(conversation, "Who?") == "the fox"
    say(conversation, "Which?")
    messages = [("user", "Who?"), ("assistant", "the fox"), ("user", "Which?")]
    assert conversation.turns[0].tokens == oddly
    assert conversation.num_prompt_tokens == len(CHATML.encode_prompt(marked, messages, [oddly]))
    assert conversation.num_prompt_tokens > len(CHATML.encode_prompt(marked, messages))


def test_with_a_template_the_oldest_turns_are_dropped_too() -> None:
    conversation = talk(random_model(replace(CONFIG, vocab_size=259)), MARKED, template=CHATML, system="S.")
    for i in range(8):
        say(conversation, f"turn {i}")
        assert conversation.num_prompt_tokens <= 256
    kept = conversation.turns[conversation.num_dropped_turns :]
    assert 0 < len(kept) < 8
    messages = [("system", "S.")]
    for turn in kept:
        messages += [("user", turn.user_text), ("assistant", turn.answer)]
    assert conversation.num_prompt_tokens == len(CHATML.encode_prompt(MARKED, messages[:-1])) + len(kept[-1].tokens)


def test_a_template_that_refuses_leaves_the_talk_as_it_was() -> None:
    picky = ChatTemplate("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}:")
    conversation = talk(random_model(CONFIG), template=picky, system="S")
    with pytest.raises(UserError, match="no system"):
        say(conversation, "Hello")
    assert conversation.turns == []
    conversation.system = ""
    assert len(say(conversation, "Hello")) == 10
