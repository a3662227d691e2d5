"""The example of the guide for programs that use the typed client, run as it stands there."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from coordinator.api.models import SubmissionState
from tests.coordinator.conftest import OpenFarm

GUIDE = Path(__file__).parents[2] / "infra" / "docs" / "api.md"
STANDARD_URL = "http://127.0.0.1:7878"


async def test_the_guides_example_names_what_failed(open_farm: OpenFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    [example] = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert STANDARD_URL in example
    async with open_farm("one") as farm:
        good = await farm.submit('{ a = run "good" "echo > $out"; }', "a")
        bad = await farm.submit('{ a = run "bad" "exit 1"; }', "a")
        assert (await farm.ended(good.id)).state is SubmissionState.SUCCEEDED
        assert (await farm.ended(bad.id)).state is SubmissionState.FAILED
        monkeypatch.setenv("DROVER_TOKEN_FILE", str(farm.settings.state_dir / "api-token"))
        scope: dict[str, Callable[[], Awaitable[list[str]]]] = {}
        exec(example.replace(STANDARD_URL, farm.coordinator.ready.url), scope)  # noqa: S102  the guide's own
        assert await scope["failed"]() == [bad.id]
