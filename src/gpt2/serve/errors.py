"""Errors of the API in OpenAI's form: an HTTP status, and a JSON body that names the field at fault."""

import json
import math

from starlette.responses import Response

from gpt2.errors import MAX_MESSAGE_CHARACTERS, NonFiniteLogitsError, UserError
from gpt2.serve.schema import ErrorBody, ErrorDetail
from gpt2.terminal import shorten

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
ERROR_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 503: "service_unavailable", 504: "timeout"}


class TooManyRequestsError(UserError):
    """The queue is full, or the client has too many open requests. retry_after: an estimate in seconds."""

    code = ERROR_CODES[429]

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDownError(UserError):
    """The scheduler accepts no more requests, or stopped before the request was finished."""

    code = ERROR_CODES[503]

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class APIError(Exception):
    """An error response.

    param:       the field of the request that is at fault, if there is one.
    retry_after: seconds after which the client should try again.
    closes:      the connection is closed after the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        closes: bool = False,
    ) -> None:
        line = shorten(message, MAX_MESSAGE_CHARACTERS)
        super().__init__(line)
        self.status, self.message, self.retry_after, self.closes = status, line, retry_after, closes
        self.param = None if param is None else shorten(param, 200)
        self.code = code or ERROR_CODES.get(status)

    @property
    def body(self) -> str:
        """The JSON body, in ASCII. Nothing is validated: a client's own words may have lone surrogates."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        detail = ErrorDetail.model_construct(message=self.message, type=kind, param=self.param, code=self.code)
        return json.dumps(ErrorBody.model_construct(error=detail).model_dump())

    def response(self) -> Response:
        """The whole response, with the headers that its status calls for."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.closes:
            headers["Connection"] = "close"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 504:
            headers["X-Should-Retry"] = "false"  # otherwise OpenAI's clients repeat the request
        return Response(self.body, self.status, headers, "application/json")


def to_api_error(error: UserError) -> APIError:
    """The error response for a UserError: 400 with the field at fault, unless the server or its model is the cause."""
    if isinstance(error, TooManyRequestsError):
        return APIError(429, str(error), retry_after=error.retry_after)
    if isinstance(error, ShuttingDownError):
        return APIError(503, str(error), retry_after=5)
    if isinstance(error, NonFiniteLogitsError):
        return APIError(500, str(error))
    return APIError(400, str(error), error.field)
