"""Requests and responses of OpenAI's API, with our samplers as further fields. An unknown field is an error."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WrapValidator
from pydantic_core import PydanticCustomError

from gpt2.generation.sampling import Sampling

MAX_TOP_LOGPROBS = 20  # of one token
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=500)]


def _union_error(expected: str) -> WrapValidator:
    """One message for a union, instead of one for each of its members."""

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
    """What a stream tells besides the text."""

    include_usage: bool | None = None


class CommonRequestFields(_StrictModel):
    """What completions and chat have in common. A field that is null means its default."""

    model: str | None = Field(None, description="one of /v1/models; by default the first of them")
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
        """The settings of the sampler. Raises UserError for those that make no sense."""
        given = {name: getattr(self, name, None) for name in Sampling.__dataclass_fields__}
        if given["min_new_tokens"] is None:
            given["min_new_tokens"] = self.min_tokens
        return Sampling(**{name: value for name, value in given.items() if value is not None})

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(CommonRequestFields):
    """POST /v1/completions"""

    prompt: Prompt | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class TextPart(_StrictModel):
    """A part of a message: text is all that this model reads."""

    type: Literal["text"]
    text: str


class Message(_StrictModel):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    @property
    def text(self) -> str:
        """All of it."""
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
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is an error."""

    error: ErrorDetail


class Usage(BaseModel):
    """Tokens that were read and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Parallel lists; `top_logprobs` is null where only the tokens' own were asked for."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]
    token_ids: list[int]
    top_token_ids: list[list[int] | None] | None


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """The answer of /v1/completions."""

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
    """The same with the most likely tokens in its place."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    """Of the tokens of a message."""

    content: list[ChatTokenLogprob] | None
    refusal: None


class ChatMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelInfo(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    vocab_size: int


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelInfo]


class TokenizeResponse(BaseModel):
    """The tokens of a text, and what each stands for (U+FFFD where it is no whole character)."""

    tokens: list[int]
    texts: list[str]
    count: int


class DetokenizeResponse(BaseModel):
    """The text of tokens."""

    text: str


class ModelHealth(BaseModel):
    """How busy a model is."""

    running: int
    waiting: int
    slots: int


class Health(BaseModel):
    """Whether the server takes requests: "ok", "draining" or "broken"."""

    status: str
    models: dict[str, ModelHealth]
