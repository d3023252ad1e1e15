"""Errors as JSON, in the shape that gateway and guard use too."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

CHINESE = {
    "json_invalid": "不是有效的 JSON",
    "missing": "缺少该字段",
    "extra_forbidden": "未知字段",
    "blank": "文本不能为空",
    "string_too_short": "文本不能为空",
    "string_unicode": "不是有效的 Unicode",
    "string_too_long": "内容过长",
    "unknown_voice": "没有该音色",
}
"""The reasons for a refused request that have words of their own in Chinese, by the validator's name for them."""


class FieldError(Exception):
    """A field of the request cannot be used, as the engine found out."""

    def __init__(self, field: str, reason: str, message: str) -> None:
        """Name the field, the reason (a key of CHINESE) and the message in English."""
        super().__init__(message)
        self.field = field
        self.reason = reason


def error_response(
    status: int, code: str, english: str, chinese: str, field: str | None = None, headers: Any = None
) -> JSONResponse:
    """An error document; `field` names what is wrong in the request."""
    kind = "invalid_request" if status < 500 else "server_error"
    error = {"code": code, "message": f"{english} / {chinese}", "type": kind}
    if field is not None:
        error["field"] = field
    error["timestamp"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return JSONResponse({"error": error}, status, headers=headers)


def field_response(field: str, reason: str, english: str) -> JSONResponse:
    """The answer to a request whose `field` is at fault: 400 where there is no JSON at all, else 422."""
    status = 400 if reason == "json_invalid" else 422
    chinese = f"{field}:{CHINESE.get(reason, '值无效')}"
    return error_response(status, reason, f"{field}: {english}", chinese, field)


def install_error_handlers(app: FastAPI) -> None:
    """Let every error of `app` leave as JSON."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        # A location is ("body", field, ...); for JSON that cannot be read it is ("body", position).
        field = next((part for part in first["loc"][1:] if isinstance(part, str)), "body")
        return field_response(field, first["type"], first["msg"])

    @app.exception_handler(FieldError)
    async def unusable(_: Request, error: FieldError) -> JSONResponse:
        return field_response(error.field, error.reason, str(error))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # FastAPI's answer to a body that is not even text
            return field_response("body", "json_invalid", str(error.detail))
        chinese = {404: "请求的资源不存在", 405: "不支持的请求方法"}.get(error.status_code, "请求失败")
        code = str(error.detail).lower().replace(" ", "_")
        return error_response(error.status_code, code, str(error.detail), chinese, headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> JSONResponse:
        # Starlette raises it again once this is sent, and the guard logs it.
        return error_response(500, "internal_error", "The synthesis failed", "语音合成失败")
