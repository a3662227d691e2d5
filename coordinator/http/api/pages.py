"""Pages of a list: so many rows from a cursor on, rendered in slices that give the event loop back.

A page is a JSON array. Where there is more, the answer has `Link: <address>; rel="next"`, whose address gives the next
page: `?limit=` rows, at most `MAX_ROWS`, behind the row that `?after=` names.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from aiohttp import web

from coordinator.api.route import Query
from coordinator.errors import BadRequestError
from coordinator.http.answers import json_of
from infra.slices import in_slices

#: Rows of one page: by default, and at most.
ROWS = 100
MAX_ROWS = 1000

_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class Page(Generic[_Row]):
    """Rows, and the cursor behind which there are more; "" where these are the last."""

    rows: Sequence[_Row]
    following: str = ""


def limit_of(request: web.Request) -> int:
    """Return how many rows the request wants. Raises `BadRequestError`."""
    return min(_number(request, "limit", ROWS), MAX_ROWS)


def position_of(request: web.Request) -> int:
    """Return how many rows the request has seen, for lists whose cursor is that number. Raises `BadRequestError`."""
    return _number(request, "after", 0)


def words_of(request: web.Request, query: Query) -> frozenset[str]:
    """Return the words of a filter, none where it is left out. Raises `BadRequestError` for one that it has not."""
    words = frozenset(word for word in request.query.get(query.name, "").split(",") if word)
    if not words <= frozenset(query.words):
        raise BadRequestError(f"`{query.name}` is one of {', '.join(query.words)}, or several with commas between.")
    return words


def cut(rows: Sequence[_Row], position: int, limit: int) -> Page[_Row]:
    """Return the rows from `position` on, for lists whose cursor is the number of rows seen."""
    end = position + limit
    return Page(rows[position:end], str(end) if end < len(rows) else "")


async def answer_page(request: web.Request, page: Page[_Row], render: Callable[[_Row], object]) -> web.Response:
    """Return a page as JSON, with the way to the next one."""
    body = b"[" + b",".join(await rendered(page.rows, lambda row: json_of(render(row)))) + b"]"
    response = web.Response(body=body, content_type="application/json")
    if page.following:
        following = request.rel_url.update_query({"after": page.following})
        response.headers["Link"] = f'<{following}>; rel="next"'
    return response


async def rendered(rows: Iterable[_Row], render: Callable[[_Row], bytes]) -> list[bytes]:
    """Render rows one after the other, and give the loop back again and again."""

    def rendering() -> Generator[None, None, list[bytes]]:
        parts = []
        for row in rows:
            parts.append(render(row))
            yield
        return parts

    return await in_slices(rendering())


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 9 or (name == "limit" and int(text) == 0):
        raise BadRequestError(f"`{name}` is a number; leave it out for the first page of {ROWS}.")
    return int(text)
