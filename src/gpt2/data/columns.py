"""The columns of a row, and the conversation or text that is in them."""

from collections.abc import Collection
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

from gpt2.errors import ConfigError, DataError, did_you_mean
from gpt2.terminal import shorten

Row = tuple[str, dict[str, Any]]
"""A location, such as ``pairs.jsonl line 7``, and the columns."""
Message = tuple[str, str]
"""Role ("system", "user", "assistant" or "tool") and text."""

_TEXT_COLUMNS = ("text", "content")
_INPUT_COLUMNS = ("input", "context")
_PROMPT_ANSWER_COLUMNS = (  # prompt and answer: names in order of preference
    ("prompt", ("answer", "completion", "response", "output")),
    ("question", ("answer",)),
    ("instruction", ("output", "response")),
)
_MESSAGES_COLUMNS = ("messages", "conversations")
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
}
_TRAIN_KEYS = ("weight", "train", "training", "train_on_turn")  # OpenAI's, and those of axolotl
_TYPE_NAMES = {
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


class Conversation(NamedTuple):
    """Messages that end with an answer, and for each answer in them whether the loss counts it."""

    messages: list[Message]
    in_loss: list[bool]


@dataclass(frozen=True)
class Columns:
    """The columns to read: a text, or a prompt (with an optional input) and its answer, or messages.

    system: an optional column, which becomes the first message of a conversation.
    """

    text: str | None = None
    prompt: str | None = None
    input: str | None = None
    answer: str | None = None
    messages: str | None = None
    system: str | None = None

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return [name for name in astuple(self) if name is not None]

    def get_text(self, row: Row) -> str:
        """The text of a row. Raises DataError if there is none."""
        assert self.text is not None
        return _get_text_field(row, self.text)

    def get_conversation(self, row: Row) -> Conversation:
        """The conversation of a row, up to the last answer that the loss counts.

        An answer with ``"weight": 0`` or ``"train": false`` is not counted. Raises DataError for a row without an
        answer to count, or with a value that is not text where text is required.
        """
        location, record = row
        system = None
        if self.system is not None and record.get(self.system) is not None:
            system = _get_text_field(row, self.system)
        if self.messages is not None:
            messages, in_loss = _parse_messages(location, self.messages, record.get(self.messages))
        else:
            messages, in_loss = self._get_pair(row), [True]
        if system and messages[0][0] != "system":
            messages.insert(0, ("system", system))
        return Conversation(messages, in_loss)

    def _get_pair(self, row: Row) -> list[Message]:
        assert self.prompt is not None
        assert self.answer is not None
        prompt, answer = _get_text_field(row, self.prompt), _get_text_field(row, self.answer)
        if self.input is not None and row[1].get(self.input) is not None:
            details = _get_text_field(row, self.input)
            prompt = f"{prompt}\n\n{details}" if details else prompt
        if not answer.strip():
            raise DataError(f"{row[0]}: '{self.answer}' is empty")
        return [("user", prompt), ("assistant", answer)]


def detect_columns(ref: str, location: str, names: Collection[str], spec: str | None = None) -> Columns:
    """The columns to read: those of `spec`, such as ``prompt=question,answer=reply``, else known ones among `names`.

    Messages have precedence over prompt and answer, and these over text. Raises DataError, with the location, if no
    name is known.
    """
    if spec:
        return _parse_columns(spec)
    system = "system" if "system" in names else None
    for name in _MESSAGES_COLUMNS:
        if name in names:
            return Columns(messages=name, system=system)
    for prompt, answers in _PROMPT_ANSWER_COLUMNS:
        answer = next((name for name in answers if name in names), None)
        if prompt in names and answer:
            details = next((name for name in _INPUT_COLUMNS if name in names), None)
            return Columns(prompt=prompt, answer=answer, input=details, system=system)
    for name in _TEXT_COLUMNS:
        if name in names:
            return Columns(text=name)
    found = shorten(", ".join(map(str, names)) or "none", 300)
    raise DataError(
        f"{location}: no known column among those of {ref} ({found}): give --columns "
        "text=NAME, prompt=NAME,answer=NAME or messages=NAME",
        field="columns",
    )


def parse_text_column(spec: str) -> str:
    """The name in ``text=NAME``. Raises ConfigError for other columns."""
    name = _parse_columns(spec).text
    if name is None:
        raise ConfigError(
            f"--columns '{spec}': a corpus on the hub is text, so only text=NAME is read", field="columns"
        )
    return name


def _parse_columns(spec: str) -> Columns:
    given: dict[str, str] = {}
    for part in spec.split(","):
        key, equals, name = (piece.strip() for piece in part.partition("="))
        keys = ("text", "prompt", "input", "answer", "messages")
        if key not in keys or not equals or not name:
            raise ConfigError(
                f"--columns '{spec}': '{part}' is not {', '.join(keys[:-1])} or messages, = and a column name"
                f"{did_you_mean(key, keys)}",
                field="columns",
            )
        given[key] = name
    if set(given) not in ({"text"}, {"messages"}, {"prompt", "answer"}, {"prompt", "input", "answer"}):
        raise ConfigError(
            f"--columns '{spec}' must name text, or messages, or prompt and answer (and input)", field="columns"
        )
    return Columns(**given)


def _get_text_field(row: Row, column: str) -> str:
    location, record = row
    value = record.get(column)
    if value is None:
        raise DataError(f"{location} has no '{column}'")
    if not isinstance(value, str):
        raise DataError(f"{location}: '{column}' is {type_name(value)}, not text")
    return value


def type_name(value: Any) -> str:
    """What a value of JSON is, for messages."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def _parse_messages(location: str, column: str, value: Any) -> Conversation:
    if value is None:
        raise DataError(f"{location} has no '{column}'")
    if not isinstance(value, list):
        raise DataError(f"{location}: '{column}' is {type_name(value)}, not a list of messages")
    parsed = [_parse_message(f"{location}, message {i}", message) for i, message in enumerate(value, 1)]
    turns = [turn for turn in parsed if turn is not None]
    answers = [i for i, (message, _) in enumerate(turns) if message[0] == "assistant"]
    if not answers:
        raise DataError(f"{location}: the conversation has no message of the assistant")
    last = max((i for i in answers if turns[i][1]), default=None)
    if last is None:
        raise DataError(f"{location}: every message of the assistant is excluded from training")
    return Conversation([message for message, _ in turns[: last + 1]], [turns[i][1] for i in answers if i <= last])


def _parse_message(location: str, value: Any) -> tuple[Message, bool] | None:
    """A message, and whether the loss counts it; None for a turn of the assistant without text, such as a tool call."""
    if not isinstance(value, dict):
        raise DataError(f"{location} is {type_name(value)}, not an object with role and content")
    keys = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    role, content = _get_text_field((location, value), keys[0]), value.get(keys[1])
    is_answer = _ROLES.get(role) == "assistant"
    if is_answer and (content is None or (content == "" and value.get("tool_calls"))):
        return None
    if isinstance(content, list):
        content = "".join(_part_text(location, part) for part in content)
    text = _get_text_field((location, {keys[1]: content}), keys[1])
    if role not in _ROLES:
        raise DataError(
            f"{location}: role '{shorten(role)}' is not one of {', '.join(_ROLES)}{did_you_mean(role, _ROLES)}"
        )
    if is_answer and not text.strip():
        raise DataError(f"{location}: the assistant's '{keys[1]}' is empty")
    return (_ROLES[role], text), is_answer and _is_in_loss(location, value)


def _part_text(location: str, part: Any) -> str:
    """The text of one part of a content that is a list, as in OpenAI's API."""
    if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        raise DataError(f"{location}: a part of 'content' is not text")
    return part["text"]


def _is_in_loss(location: str, message: dict[str, Any]) -> bool:
    """Whether none of the message's keys excludes it from the loss."""
    for key in _TRAIN_KEYS:
        value = message.get(key)
        if value is not None and (not isinstance(value, int | float) or value not in (0, 1)):
            raise DataError(f"{location}: '{key}' is {value!r:.40}; only 0, 1, true and false are supported")
    return all(message.get(key) in (None, 1) for key in _TRAIN_KEYS)
