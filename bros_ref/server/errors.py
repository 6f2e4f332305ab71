"""Errors in OpenAI's shape, so that the official clients raise the exceptions their users expect.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Invariant: a message says what was wrong and what to do, and never quotes the user's text back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
RETRY_AFTER_S = 1  # what a full queue advises; clients add their own backoff


class APIError(Exception):
    """An answer other than success.

    Attributes:
        status: HTTP status. 400 for what the client can fix, 404, 413, 429 or 503 for a full queue.
        param: the field at fault, or None.
        code: a short name that programs can compare, or None.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": TYPES.get(self.status, fallback), "param": self.param,
                          "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer; a full queue says when to try again."""
        headers = {"retry-after": str(RETRY_AFTER_S)} if self.status in (429, 503) else None
        if self.status == 401:
            headers = {"www-authenticate": "Bearer"}
        return JSONResponse(self.body(), self.status, headers)


class ErrorDetail(BaseModel):
    """The inner object of every error answer."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error answer."""

    error: ErrorDetail


def not_found(what: str, identifier: str) -> APIError:
    """404 for an id that does not exist or belongs to another key."""
    return APIError(404, f"no {what} with id {identifier[:80]!r}", "id", "not_found")


def from_validation(errors: Sequence[Any]) -> APIError:
    """The most specific of pydantic's errors as a 400 that names the field. The rejected value is not repeated."""
    first = max(errors, key=lambda error: len(error["loc"]))  # of a union, the alternative that fitted furthest
    where = [str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier()]  # no names of types
    where = where[1:] if where[:1] in (["body"], ["query"], ["path"], ["header"]) else where
    param = ".".join(where)[:200] or None
    if first["type"] == "extra_forbidden":
        return APIError(400, f"{param!r} is not supported by this server; leave it out", param, "unsupported_parameter")
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is not valid JSON: {first['ctx']['error']} at position {first['loc'][-1]}")
    count = f" ({len(errors)} fields are wrong)" if len(errors) > 1 else ""
    return APIError(400, f"{param or 'the body'}: {first['msg']}{count}", param, "invalid_value")


def install_error_handlers(app: FastAPI) -> None:
    """Makes every failure of a route, of validation and of the framework an error in OpenAI's shape."""

    async def on_api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, APIError)
        return error.response()

    async def on_validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors()).response()

    async def on_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        response = APIError(error.status_code, _explain(error)).response()
        response.headers.update(error.headers or {})
        return response

    async def on_bug(_: Request, error: Exception) -> JSONResponse:
        return APIError(500, f"the server failed with {type(error).__name__}; its log has the details").response()

    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_bug)


def _explain(error: HTTPException) -> str:
    match error.status_code:
        case 404:
            return "there is nothing at this address; /docs lists the routes"
        case 405:
            return "this address does not take that method; /docs lists the routes"
        case 413:
            return "the body is larger than this server takes"
    return str(error.detail)
