"""POST /v1/responses: a chat request in another form. Nothing is stored, so the input is the whole conversation."""

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from gpt2.serve import chat_completions, schema
from gpt2.serve import responses_schema as forms
from gpt2.serve.errors import APIError
from gpt2.serve.limits import Limits
from gpt2.serve.models import ServedModel
from gpt2.serve.response_stream import ParsedRequest, ResponseStream, response_header


def parse_request(body: forms.ResponsesRequest, served: ServedModel, limits: Limits) -> ParsedRequest:
    """The request with its defaults. Raises APIError and UserError for fields that are not supported."""
    if body.max_output_tokens is not None and body.max_output_tokens > limits.max_tokens:
        message = f"max_output_tokens is at most {limits.max_tokens:,} on this server, not {body.max_output_tokens:,}"
        raise APIError(400, message, "max_output_tokens")
    fields = {
        "messages": _messages(body),
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": body.seed,
        "truncate": "none" if body.truncation == "disabled" else None,
    }
    chat = schema.ChatRequest.model_validate(fields)
    try:
        return chat_completions.parse_request(chat, served, limits)
    except APIError as error:
        if error.param == "messages":
            raise APIError(error.status, error.message.replace("messages", "input"), "input", error.code) from None
        raise


def _messages(body: forms.ResponsesRequest) -> list[dict[str, str]]:
    """The messages of a chat request. Raises APIError if it has no message."""
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    items = [forms.InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    for number, item in enumerate(items):
        if item.type in ("function_call", "reasoning"):
            continue
        content = item.output if item.type == "function_call_output" else item.content
        role = "tool" if item.type == "function_call_output" else item.role
        if role is None or content is None:
            raise APIError(400, f"input[{number}]: a message needs role and content", f"input[{number}]")
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        messages.append({"role": role, "content": text})
    if not messages:
        raise APIError(400, "input has no message", "input")
    return messages


async def create_response(body: forms.ResponsesRequest, response: ResponseStream) -> forms.ResponsesResponse:
    """The response without streaming."""
    await response.collect()
    choice = response.choices[0]
    text = chat_completions.strip_answer_prefix(choice.text, response.request.served)
    return _response(body, response, _new_header(response), _message(_new_id("msg"), text, _status(response)))


async def response_events(
    body: forms.ResponsesRequest, response: ResponseStream
) -> AsyncGenerator[forms.ResponsesEvent]:
    """The response as a stream of events. The first ones wait for the text to begin, so that errors have a status."""
    header, message_id = _new_header(response), _new_id("msg")
    place: dict[str, Any] = {"item_id": message_id, "output_index": 0, "content_index": 0}
    text, number = "", 0

    def event(kind: str, **fields: Any) -> forms.ResponsesEvent:
        nonlocal number
        number += 1
        return forms.ResponsesEvent(type=f"response.{kind}", sequence_number=number - 1, **fields)

    def start_events() -> list[forms.ResponsesEvent]:
        waiting = _response(body, response, header, None)
        return [
            event("created", response=waiting),
            event("in_progress", response=waiting),
            event("output_item.added", output_index=0, item=_message(message_id, None, "in_progress")),
            event("content_part.added", **place, part=_output_text("")),
        ]

    async with aclosing(response.deltas()) as deltas:
        async for delta in deltas:
            if number == 0:
                for one in start_events():
                    yield one
            new = delta.text if text else chat_completions.strip_answer_prefix(delta.text, response.request.served)
            text += new
            if new:
                yield event("output_text.delta", **place, delta=new, logprobs=[])
    status = _status(response)
    message = _message(message_id, text, status)
    yield event("output_text.done", **place, text=text, logprobs=[])
    yield event("content_part.done", **place, part=_output_text(text))
    yield event("output_item.done", output_index=0, item=message)
    yield event(status, response=_response(body, response, header, message))


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def _new_header(response: ResponseStream) -> dict[str, Any]:
    """The fields that the response and the events about it share."""
    header = response_header("resp", response.request.served)
    return {"id": _new_id("resp"), "created_at": header["created"], "model": header["model"]}


def _status(response: ResponseStream) -> Literal["completed", "incomplete"]:
    return "incomplete" if response.choices[0].finish_reason == "length" else "completed"


def _output_text(text: str) -> forms.OutputText:
    return forms.OutputText(type="output_text", text=text, annotations=[], logprobs=[])


def _message(
    message_id: str, text: str | None, status: Literal["in_progress", "completed", "incomplete"]
) -> forms.OutputMessage:
    content = [] if text is None else [_output_text(text)]
    return forms.OutputMessage(id=message_id, type="message", role="assistant", status=status, content=content)


def _response(
    body: forms.ResponsesRequest, response: ResponseStream, header: dict[str, Any], message: forms.OutputMessage | None
) -> forms.ResponsesResponse:
    """The response with its message; in progress without one."""
    request, incomplete = response.request, message is not None and message.status == "incomplete"
    usage = forms.ResponsesUsage(
        input_tokens=response.prompt_tokens,
        input_tokens_details=forms.InputTokensDetails(cached_tokens=0, cache_write_tokens=0),
        output_tokens=response.new_tokens,
        output_tokens_details=forms.OutputTokensDetails(reasoning_tokens=0),
        total_tokens=response.prompt_tokens + response.new_tokens,
    )
    dropped: dict[str, Any] = (
        {"truncated_messages": request.num_dropped_messages} if request.num_dropped_messages else {}
    )
    return forms.ResponsesResponse(
        **header,
        object="response",
        status="in_progress" if message is None else "incomplete" if incomplete else "completed",
        error=None,
        incomplete_details=forms.IncompleteDetails(reason="max_output_tokens") if incomplete else None,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        output=[] if message is None else [message],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=None,
        reasoning={"effort": None, "summary": None},
        store=False,
        temperature=request.sampling.temperature,
        text={"format": {"type": "text"}},
        tool_choice=body.tool_choice or "auto",
        tools=[],
        top_p=request.sampling.top_p,
        truncation=body.truncation or "auto",
        usage=None if message is None else usage,
        user=body.user,
        metadata=body.metadata or {},
        **dropped,
    )
