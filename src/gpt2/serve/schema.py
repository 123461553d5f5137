"""Requests and responses of OpenAI's API, with further fields for more samplers. Unknown fields are errors.

Responses are built from these types, and the fields that are set are sent.
"""

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WrapValidator
from pydantic_core import PydanticCustomError

from gpt2.generation.sampling import Sampling

MAX_TOP_LOGPROBS = 20  # for each token
FinishReason = Literal["stop", "length"]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=500)]


def _union_error(expected: str) -> WrapValidator:
    """One error message for a union, instead of one for each of its members."""

    def validate(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValueError:
            raise PydanticCustomError("union", "must be {meaning}", {"meaning": expected}) from None

    return WrapValidator(validate)


TokenIds = list[Count]
Prompt = Annotated[
    str | list[str] | TokenIds | list[TokenIds],
    _union_error("a text, a list of texts, a list of token ids, or a list of such lists"),
]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=16)],
    _union_error("a text of 1 to 500 characters, or a list of up to 16 such texts"),
]
Content = Annotated["str | list[TextPart]", _union_error("a text, or a list of parts of type 'text'")]


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_StrictModel):
    """Options of a stream."""

    include_usage: bool | None = None


class CommonRequestFields(_StrictModel):
    """The fields that completions and chat share. A field that is null has its default."""

    model: str | None = Field(None, description="one of /v1/models; the first of them by default")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | None = None
    seed: Int64 | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    user: str | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    logit_bias: dict[str, float] | None = None
    top_k: Count | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    epsilon_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    eta_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    no_repeat_ngram_size: Count | None = None
    min_tokens: Count | None = None
    min_new_tokens: Count | None = None
    bad_words: Annotated[list[Annotated[TokenIds, Field(min_length=1)]], Field(max_length=1000)] | None = None

    def sampling(self) -> Sampling:
        """The sampling parameters. Raises UserError for values that are not supported."""
        given = {name: getattr(self, name, None) for name in Sampling.__dataclass_fields__}
        if given["min_new_tokens"] is None:
            given["min_new_tokens"] = self.min_tokens
        return Sampling(**{name: value for name, value in given.items() if value is not None})

    def resolve_seed(self) -> int:
        """The seed, or a random one."""
        return secrets.randbits(32) if self.seed is None else self.seed

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of a stream has the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(CommonRequestFields):
    """POST /v1/completions"""

    prompt: Prompt | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class TextPart(_StrictModel):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Message(_StrictModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    @property
    def text(self) -> str:
        """Its text parts, joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(CommonRequestFields):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2048)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class TokenizeRequest(_StrictModel):
    """POST /tokenize"""

    model: str | None = None
    text: str


class DetokenizeRequest(_StrictModel):
    """POST /detokenize"""

    model: str | None = None
    tokens: TokenIds


class ErrorDetail(BaseModel):
    """An error: its message, the kind of error, the request field at fault, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


class Usage(BaseModel):
    """Token counts of a response: each prompt once, and the new tokens of all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Parallel lists with an entry for each token; the `top_` lists are null for `logprobs: 0`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]
    token_ids: list[int]
    top_token_ids: list[list[int] | None] | None


class CompletionChoice(BaseModel):
    """One generated text, or in a stream the next part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The response of /v1/completions, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatTopLogprob(BaseModel):
    """A token, its log-probability, and its bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ChatTopLogprob):
    """A generated token, with the most likely tokens at its position."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    """The log-probabilities of the tokens of a message."""

    content: list[ChatTokenLogprob] | None
    refusal: None


class ChatMessage(BaseModel):
    """The generated message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One generated message with its finish reason."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """The next part of a message; the first one of a choice has the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """The next part of a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(BaseModel):
    """A chunk of the stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelInfo(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    vocab_size: int


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"]
    data: list[ModelInfo]


class TokenizeResponse(BaseModel):
    """The token ids of a text, and the text of each token (U+FFFD where it is not a whole character)."""

    tokens: list[int]
    texts: list[str]
    count: int


class DetokenizeResponse(BaseModel):
    """The text of the tokens."""

    text: str


class ModelHealth(BaseModel):
    """The load of a model: sequences with a slot, sequences that wait, and the number of slots."""

    running: int
    waiting: int
    slots: int


class Health(BaseModel):
    """Whether the server accepts requests: "ok", "draining" or "broken"."""

    status: str
    models: dict[str, ModelHealth]
