"""Reader of the forms that pages send: bounded, urlencoded, one value a field."""

from __future__ import annotations

from contextlib import aclosing
from typing import Final
from urllib.parse import parse_qsl

from aiohttp import web

from coordinator.api.route import Content
from coordinator.errors import BadRequestError
from coordinator.http.bodies import PATIENCE_S, BodyTooLargeError, body_chunks

#: Bytes of a form: room for a store path, a token and an address to go back to.
FORM_BYTES: Final = 16 * 1024
#: Fields of a form.
FORM_FIELDS: Final = 16


async def read_form(request: web.Request) -> dict[str, str]:
    """Return the fields of a form.

    Raises:
        BadRequestError: it is none.
        BodyTooLargeError, BodyEncodedError, BodySlowError: see there.
    """
    if request.content_type != Content.FORM:
        raise BadRequestError("this address takes a form of a page.")
    data = bytearray()
    async with aclosing(body_chunks(request, PATIENCE_S)) as chunks:
        async for chunk in chunks:
            data += chunk
            if len(data) > FORM_BYTES:
                raise BodyTooLargeError(f"the form is larger than {FORM_BYTES} bytes.")
    try:
        pairs = parse_qsl(data.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=FORM_FIELDS)
    except ValueError:
        raise BadRequestError("the form cannot be read; reload its page and send it again.") from None
    return dict(pairs)
