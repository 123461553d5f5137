"""Requests, responses and stream events of /v1/responses: text in, text out."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gpt2.serve.field_types import Count, Int64, StrictModel, expect
from gpt2.serve.neutral_fields import Absent, Off, TextFormat

_NO_TOOLS = "the model cannot call tools"
TEXT_PARTS = ("input_text", "output_text", "text")


class InputPart(StrictModel):
    """A part of a message. Further fields, such as `annotations`, are ignored."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["input_text", "output_text", "text"]
    text: str


InputContent = Annotated[
    str | Annotated[list[InputPart], Field(fail_fast=True)],
    expect(f"must be a text, or a list of parts of type {', '.join(TEXT_PARTS)}"),
]


class InputItem(StrictModel):
    """A message, or an item of an earlier response. Further fields (`id`, `status`, ...) are ignored.

    Items of type `function_call_output` become messages of a tool; `function_call` and `reasoning` are left out.
    """

    model_config = ConfigDict(extra="ignore")

    type: Annotated[
        Literal["message", "function_call", "function_call_output", "reasoning"] | None,
        expect("must be message, function_call, function_call_output or reasoning"),
    ] = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: InputContent | None = None
    output: InputContent | None = None


class TextOptions(StrictModel):
    """The format of the text."""

    format: Annotated[
        TextFormat | None,
        expect("must be {'type': 'text'}: JSON mode is not supported, the text cannot be constrained to a format"),
    ] = None
    verbosity: Annotated[Literal["medium"] | None, expect("is not supported: it can only be 'medium'")] = None


class ReasoningOptions(StrictModel):
    """Without effect: the model does not reason."""

    effort: Annotated[Literal["none"] | None, expect("must be 'none': the model does not reason")] = None
    summary: Absent = None


class ResponsesStreamOptions(StrictModel):
    """Options of a stream."""

    include_obfuscation: bool | None = Field(None, description="no effect")


class ResponsesRequest(StrictModel):
    """POST /v1/responses"""

    model: str | None = None
    input: Annotated[
        str | Annotated[list[InputItem], Field(min_length=1, max_length=2048, fail_fast=True)],
        expect("must be a text, or a list of messages of text"),
    ]
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Int64 | None = Field(None, description="as in /v1/chat/completions")
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="'auto' (the default): the oldest turns are dropped when the conversation does not fit"
    )
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Annotated[list[Any] | None, Field(description="left out, with a Warning header")] = None
    tool_choice: Annotated[Literal["none", "auto"] | None, expect(f"must be 'none' or 'auto': {_NO_TOOLS}")] = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Count | None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None
    store: Annotated[bool | None, Field(description="nothing is stored")] = None
    metadata: Annotated[dict[str, Any] | None, Field(description="not stored")] = None
    background: Off = None
    previous_response_id: Annotated[None, expect("is not supported: send the whole conversation as input")] = None
    conversation: Annotated[None, expect("is not supported: send the whole conversation as input")] = None
    prompt: Absent = None
    top_logprobs: Annotated[Literal[0] | None, expect("is not supported: it can only be 0")] = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None

    @property
    def warnings(self) -> list[str]:
        """What was left out."""
        offered = bool(self.tools) and self.tool_choice != "none"
        items = [] if isinstance(self.input, str) else self.input
        calls = any(item.type == "function_call" for item in items)
        return [f"{name} left out: {_NO_TOOLS}" for name in ["tools"] * offered + ["function_call"] * calls]


class OutputText(BaseModel):
    """The generated text."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(BaseModel):
    """The generated message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class InputTokensDetails(BaseModel):
    """Tokens of OpenAI's prompt cache: always 0."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    """There are no reasoning tokens."""

    reasoning_tokens: int


class ResponsesUsage(BaseModel):
    """Token counts of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why the text ended early."""

    reason: Literal["max_output_tokens"]


class ResponsesResponse(BaseModel):
    """The response of /v1/responses, and a part of some events of its stream."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete"]
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, None]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str
    tools: list[Any]
    top_p: float
    truncation: str
    usage: ResponsesUsage | None
    user: str | None
    metadata: dict[str, Any]
    truncated_messages: int | None = None


class ResponsesEvent(BaseModel):
    """An event of the stream: its type, its number, and the fields of that type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
