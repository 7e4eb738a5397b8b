"""Errors in OpenAI's form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from omni_jax.runtime.engine_options import CapacityError

RETRY = {"Retry-After": "1"}


class ApiError(Exception):
    """What a client is told instead of an answer.

    Attributes:
      status: of HTTP.
      message: one line that names the input and the remedy.
      param: the field that is wrong, or None.
      code: for programs, or None.
      kind: `invalid_request_error`, or another of OpenAI's types.
      headers: of the response.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        kind: str = "invalid_request_error", headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code
        self.kind, self.headers = kind, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": …}`."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """As an answer of HTTP."""
        return JSONResponse(self.body, self.status, self.headers)


def busy(message: str, status: int = 429) -> ApiError:
    """There is no room now; it may be asked again."""
    return ApiError(
        status, message, code="rate_limit_exceeded" if status == 429 else "overloaded",
        kind="rate_limit_error" if status == 429 else "server_error", headers=RETRY,
    )  # fmt: skip


def of_input(error: ValueError, param: str | None = None) -> ApiError:
    """Bad input as a client is told of it; `param` is the field that it stands in, where the message names none.

    Messages of settings begin with the name of the setting.
    """
    if isinstance(error, CapacityError):
        return busy(str(error), 503)
    message = str(error)
    if param is None and (named := re.match(r"([a-z_]+) is ", message)):
        param = named[1]
    return ApiError(400, message, param=param, code=getattr(error, "code", None))


def internal() -> ApiError:
    """Something is wrong here and not with the request; the log says what."""
    return ApiError(500, "the server has failed; its log says why", code="internal_error", kind="server_error")
