"""Fields of OpenAI and vLLM that clients send although they ask for nothing: accepted at values that change nothing.

Any other value is an error that says what is not supported.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from gpt2.serve.field_types import StrictModel, expect

_NO_TOOLS = "the model cannot call tools"
_NO_GRAMMAR = expect("is not supported: the text cannot be constrained to a format")
Off = Annotated[Literal[False] | None, expect("is not supported: it can only be false")]
On = Annotated[Literal[True] | None, expect("is not supported: it can only be true")]
Absent = Annotated[None, expect("is not supported: it can only be null")]
Unconstrained = Annotated[None, _NO_GRAMMAR]
EmptyObject = Annotated[dict[str, Any], Field(max_length=0)]


class TextFormat(StrictModel):
    """`response_format` of plain text."""

    type: Literal["text"]


class NeutralFields(StrictModel):
    """Fields without an effect on completions and chat."""

    store: Annotated[Literal[False] | None, expect("must be false: the server stores nothing")] = None
    metadata: Annotated[dict[str, Any] | None, Field(description="not stored")] = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    request_id: str | None = None
    priority: Annotated[Literal[0] | None, expect("is not supported: it can only be 0")] = None
    response_format: Annotated[
        TextFormat | None,
        expect("must be {'type': 'text'}: JSON mode is not supported, the text cannot be constrained to a format"),
    ] = None
    guided_json: Unconstrained = None
    guided_regex: Unconstrained = None
    guided_choice: Unconstrained = None
    guided_grammar: Unconstrained = None
    structured_outputs: Unconstrained = None
    add_special_tokens: Annotated[bool | None, Field(description="GPT-2 adds no special tokens")] = None
    spaces_between_special_tokens: bool | None = None
    detokenize: On = None
    include_stop_str_in_output: Off = None
    return_tokens_as_token_ids: Off = None
    use_beam_search: Off = None
    early_stopping: Off = None
    length_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    prompt_logprobs: Absent = None
    truncate_prompt_tokens: Absent = None


class NeutralChatFields(StrictModel):
    """Fields without an effect on chat."""

    tools: Annotated[list[Any] | None, Field(description="left out, with a Warning header")] = None
    tool_choice: Annotated[Literal["none", "auto"] | None, expect(f"must be 'none' or 'auto': {_NO_TOOLS}")] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Any] | None, Field(description="left out, with a Warning header")] = None
    function_call: Annotated[Literal["none", "auto"] | None, expect(f"must be 'none' or 'auto': {_NO_TOOLS}")] = None
    modalities: Annotated[list[Literal["text"]] | None, expect("must be ['text']: the model writes only text")] = None
    audio: Absent = None
    prediction: Absent = None
    web_search_options: Absent = None
    documents: Absent = None
    chat_template: Absent = None
    chat_template_kwargs: Annotated[EmptyObject | None, expect("is not supported: it can only be empty")] = None
    add_generation_prompt: On = None
    continue_final_message: Off = None
    echo: Off = None
    best_of: Annotated[Literal[1] | None, expect("is not supported in a chat: it can only be 1")] = None
    reasoning_effort: Annotated[Literal["none"] | None, expect("must be 'none': the model does not reason")] = None
    verbosity: Annotated[Literal["medium"] | None, expect("is not supported: it can only be 'medium'")] = None

    @property
    def has_unused_tools(self) -> bool:
        """Whether the model was offered tools, which are left out."""
        offered = self.tools and self.tool_choice != "none"
        return bool(offered or (self.functions and self.function_call != "none"))
