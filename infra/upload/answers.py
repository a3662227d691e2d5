"""Answers of the upload protocol, read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from infra.decoding import decoder
from infra.exchange import Answer
from infra.upload.errors import SenderRefusedError, UploadFailedError
from infra.upload.protocol import UploadMessage

#: Bytes of an answer that are read.
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024

_Answer = TypeVar("_Answer", bound=UploadMessage)


def require_success(answer: Answer) -> None:
    """Raise `SenderRefusedError` for a status that is no success."""
    if answer.status < 300:
        return
    code, message = "", f"the coordinator answered with status {answer.status}"
    if answer.status == 401:
        code, message = "unauthorized", "the coordinator does not know this token, or it may not write to this cache"
    else:
        error_body = _error_body(answer)
        code, message = str(error_body.get("code", "")), str(error_body.get("message", message))
    raise SenderRefusedError(message, code=code, status=answer.status)


def _error_body(answer: Answer) -> Mapping[str, Any]:
    try:
        error_body = json.loads(answer.body)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return error_body if isinstance(error_body, dict) else {}


def parse(answer: Answer, model: type[_Answer]) -> _Answer:
    """Return the message that an answer is. Raises `UploadFailedError` where it is none, or longer than all are."""
    if len(answer.body) > MAX_ANSWER_BYTES:
        raise UploadFailedError(f"the coordinator's answer is longer than {MAX_ANSWER_BYTES} bytes")
    return parse_message(answer.body, model)


def parse_message(text: bytes | str, model: type[_Answer]) -> _Answer:
    """Return the message that a JSON text is. Raises `UploadFailedError`."""
    kind: Any = model
    try:
        message: _Answer = decoder(kind)(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UploadFailedError("the coordinator's answer cannot be read: is it another release?") from error
    return message
