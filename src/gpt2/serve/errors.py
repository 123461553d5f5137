"""What a client can do wrong, in the form OpenAI's clients know: a status, and a body that names the thing."""

import json
import math
from typing import Any

from starlette.responses import Response

from gpt2.errors import NonFiniteLogitsError, UserError
from gpt2.generation.sampling import Sampling

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
ERROR_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 503: "service_unavailable", 504: "timeout"}
SAMPLING_FIELDS = frozenset(Sampling.__dataclass_fields__)


class APIError(Exception):
    """An answer that is an error.

    param: the field of the request that is at fault, if one is.
    retry_after: seconds after which it is worth trying again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after
        self.code = code or ERROR_CODES.get(status)

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer, in ASCII: what a client has sent may be no text."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 504:
            headers["X-Should-Retry"] = "false"  # OpenAI's clients would ask for the same again
        return Response(json.dumps(self.body), self.status, headers, "application/json")


def to_api_error(error: UserError) -> APIError:
    """A UserError as the client's fault, with the setting it names; a damaged model is the server's."""
    message = str(error)
    if isinstance(error, NonFiniteLogitsError):
        return APIError(500, message)
    first = message.split(" ")[0].rstrip(":,").replace("-", "_")
    return APIError(400, message, first if first in SAMPLING_FIELDS else None)
