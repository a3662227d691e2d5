"""Bounds of a field, said without pydantic and kept by it: records have them that clients make and strangers send.

A client makes such a record as it is, and imports no pydantic for it. Where bytes of a stranger become one, pydantic
reads the bounds from its annotations, as those of any model.
"""

from __future__ import annotations

from typing import Any, Final


class FieldBounds:
    """Keywords of pydantic's schema: `ge`, `le`, `lt`, `min_length`, `max_length`, `pattern`.

    Of a tuple `fail_fast` too: its first bad member ends the check.
    """

    def __init__(self, **keywords: int | str) -> None:
        self.keywords: Final = keywords

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Add the keywords to the schema of the annotated type."""
        return {**handler(source), **self.keywords}
