"""Requests and responses of OpenAI's API, with further fields for more samplers. Unknown fields are errors.

Responses are built from these types, and the fields that are set are sent.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from gpt2.errors import RequestError
from gpt2.generation.defaults import TOP_K
from gpt2.generation.sampling import Sampling, resolve_seed
from gpt2.generation.text import make_sampling
from gpt2.serve.field_types import (
    WHOLE,
    Count,
    Int64,
    Samples,
    StrictModel,
    TokenIds,
    expect,
    limit_items,
    limit_prompts,
)
from gpt2.serve.neutral_fields import NeutralChatFields, NeutralFields

MAX_TOP_LOGPROBS = 20  # for each token
MAX_LOGIT_BIAS = 4096  # items
MAX_PROMPTS = 4096  # whatever `Limits.max_prompts` is
MAX_CONTENT_PARTS = 4096  # of a message
FinishReason = Literal["stop", "length"]
TopLogprobs = Annotated[int, WHOLE, Field(ge=0, le=MAX_TOP_LOGPROBS)]
StopString = Annotated[str, Field(max_length=500)]
Prompt = Annotated[
    str | Annotated[list[str], Field(fail_fast=True)] | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)],
    expect("must be a text, a list of texts, a list of token ids, or a list of such lists"),
    limit_prompts(MAX_PROMPTS),
]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)],
    expect("must be a text of up to 500 characters, or a list of up to 16 such texts"),
]
CompletionTopLogprobs = Annotated[bool | TopLogprobs, expect(f"must be 0 to {MAX_TOP_LOGPROBS}, true or false")]
Content = Annotated[
    "str | Annotated[list[TextPart], Field(max_length=MAX_CONTENT_PARTS, fail_fast=True)]",
    expect(f"must be a text, or a list of up to {MAX_CONTENT_PARTS} parts of type 'text'"),
]
LogitBias = Annotated[dict[str, float], limit_items(MAX_LOGIT_BIAS)]
BadWords = Annotated[list[Annotated[TokenIds, Field(min_length=1)]], Field(max_length=1000, fail_fast=True)]


class StreamOptions(StrictModel):
    """Options of a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="whether every chunk has the token counts")
    include_obfuscation: bool | None = Field(None, description="no effect")


class CommonRequestFields(NeutralFields):
    """The fields that completions and chat share. A field that is null has its default."""

    model: str | None = Field(None, description="one of /v1/models; the first of them by default")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Samples | None = None
    stop: Stop | None = None
    seed: Int64 | None = Field(None, description="-1 for a random one, as null")
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    max_new_tokens: Count | None = Field(None, description="the same, as the commands and Python call it")
    user: str | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    logit_bias: LogitBias | None = None
    top_k: Annotated[int, WHOLE, Field(ge=-1, le=2**31)] | None = Field(
        None, description=f"{TOP_K} by default; 0 and -1 for all tokens"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    epsilon_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    eta_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    no_repeat_ngram_size: Count | None = None
    min_tokens: Count | None = None
    min_new_tokens: Count | None = None
    bad_words: BadWords | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=1000)] | None = None
    ignore_eos: bool | None = Field(None, description="whether the end-of-text token is never generated")
    skip_special_tokens: bool | None = Field(None, description="false to show special tokens in the text")

    def sampling(self) -> Sampling:
        """The sampling parameters. Raises UserError for values that are not supported."""
        given = {name: getattr(self, name, None) for name in Sampling.__dataclass_fields__}
        if given["min_new_tokens"] is None:
            given["min_new_tokens"] = self.min_tokens
        if self.top_k == -1:
            given["top_k"] = 0
        return make_sampling({name: value for name, value in given.items() if value is not None})

    def resolve_seed(self) -> int:
        """The seed, or a random one for null and -1."""
        return resolve_seed(self.seed)

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list, without empty ones."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of a stream has the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_in_chunks(self) -> bool:
        """Whether every chunk of a stream has the token counts."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(CommonRequestFields):
    """POST /v1/completions"""

    prompt: Prompt | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: Samples | None = None
    logprobs: CompletionTopLogprobs | None = Field(None, description="true for 1, false for none")

    @property
    def top_logprobs(self) -> int | None:
        """The number of most likely tokens to report; None for no log-probabilities."""
        return None if self.logprobs is None or self.logprobs is False else int(self.logprobs)


class TextPart(StrictModel):
    """A part of a message; only text is supported. Further fields, such as `cache_control`, are ignored."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: str


class Message(StrictModel):
    """A message of a conversation, as clients and this server write it.

    Further fields are ignored: those of replies (`refusal`, `annotations`, ...) come back with the next request.
    """

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = Field(None, description="required, except in assistant messages")
    tool_calls: list[Any] | None = Field(None, description="left out, with a Warning header")

    @model_validator(mode="after")
    def _require_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "a message of role '{role}' needs content", {"role": self.role})
        return self

    @property
    def text(self) -> str:
        """Its text parts, joined."""
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)

    @property
    def template_role(self) -> str:
        """Its role for the chat template: `developer` and `function` are other names of `system` and `tool`."""
        return {"developer": "system", "function": "tool"}.get(self.role, self.role)


class ChatRequest(CommonRequestFields, NeutralChatFields):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2048, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    truncate: Literal["oldest", "none"] | None = Field(
        None, description="'oldest' (the default): the oldest turns are dropped when the conversation does not fit"
    )

    @property
    def warnings(self) -> list[str]:
        """What was left out."""
        calls = any(message.tool_calls for message in self.messages)
        left_out = ["tools"] * self.has_unused_tools + ["tool_calls"] * calls
        return [f"{name} left out: the model cannot call tools" for name in left_out]


class TokenizeRequest(StrictModel):
    """POST /tokenize: the text in one of three fields, `prompt` as in vLLM and `content` as in llama.cpp."""

    model: str | None = None
    text: Annotated[str, Field(max_length=2**20)] | None = None
    prompt: Annotated[str, Field(max_length=2**20)] | None = None
    content: Annotated[str, Field(max_length=2**20)] | None = None
    add_special_tokens: bool | None = Field(None, description="no effect: GPT-2 adds no special tokens")

    @property
    def given_text(self) -> str:
        """The text. Raises RequestError unless exactly one field has it."""
        texts = [text for text in (self.text, self.prompt, self.content) if text is not None]
        if len(texts) != 1:
            raise RequestError("give the text in one of the fields text, prompt and content", field="text")
        return texts[0]


class DetokenizeRequest(StrictModel):
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
    truncated_messages: int | None = None
    """The number of old messages that were dropped because the conversation did not fit the context."""


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
    truncated_messages: int | None = None


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
