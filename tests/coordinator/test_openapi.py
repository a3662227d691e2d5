"""The API keeps to its description: it takes what that allows, refuses what that forbids, and answers as it says."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import aiohttp
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok

from coordinator.api import routes
from coordinator.api.route import Content, Route
from coordinator.config import Settings
from coordinator.http.api.openapi import TABLES, description
from coordinator.main import open_coordinator
from coordinator.remote_settings import RemoteEvaluationSettings
from tests.support.local_fleet import no_workers
from tests.support.patience import PATIENCE_S

#: Bodies that no JSON schema describes; `test_streams.py`, `test_environments.py` and `test_http_uploads.py` send them.
STREAMS = {
    each.media_type for each in (Content.DERIVATIONS, Content.SOURCES, Content.TREE, Content.WISHES, Content.PACK)
}
#: Requests of each operation, of each kind.
EXAMPLES = 12
#: Bytes of a request line that every request may have.
MAX_URL = 8_000


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
async def test_every_operation_keeps_to_the_description(mode: GenerationMode, tmp_path: Path) -> None:
    # Where it is off, every request is refused as nothing that this farm takes.
    remote = RemoteEvaluationSettings(enabled=True)
    wanted = Settings(state_dir=tmp_path / "farm", port=0, remote_evaluation=remote)
    async with open_coordinator(wanted, no_workers) as coordinator:
        token = coordinator.ready.token_file.read_text().strip()
        faults = await asyncio.to_thread(faults_of, coordinator.ready.url, token, mode)
    assert "\n\n".join(faults) == ""


def faults_of(url: str, token: str, mode: GenerationMode) -> list[str]:
    """Send each operation requests, and return what schemathesis finds wrong, with every check that it has."""
    schema = schemathesis.openapi.from_dict(description("0"))
    # No schema describes a derivation or a graph: those that the farm does not take are 422.
    schema.config.checks.positive_data_acceptance.expected_statuses += ["422"]
    faults = []
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()
        if operation.body and operation.body[0].media_type in STREAMS:
            continue

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def send(case: schemathesis.Case[Any]) -> None:
            assume(mode is GenerationMode.POSITIVE or is_sent_as_drawn(case, url))
            case.call_and_validate(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=PATIENCE_S)

        try:
            send()
        except Unsatisfiable:
            # It takes nothing, so nothing that it takes can be wrong.
            assert mode is GenerationMode.NEGATIVE
        except FailureGroup as failed:
            faults += [f"{operation.label}: {error}" for error in failed.exceptions]
    return faults


def is_sent_as_drawn(case: schemathesis.Case[Any], url: str) -> bool:
    """Return whether a wrong request is still wrong once it is written down.

    A parameter without values is not sent at all, null is sent as an empty one, and that is one that was left out. A
    request line over 8,190 bytes is refused by the parser, before there is a route that could keep to anything.
    """
    sent = requests.Request(**case.as_transport_kwargs(base_url=url)).prepare()
    assert sent.url is not None
    wire = dict(parse_qsl(urlsplit(sent.url).query, keep_blank_values=True))
    return (case.query or {}).keys() <= wire.keys() and "" not in wire.values() and len(sent.url) < MAX_URL


async def test_a_mistyped_parameter_is_refused_and_the_description_needs_no_token(tmp_path: Path) -> None:
    async with (
        open_coordinator(Settings(state_dir=tmp_path / "farm", port=0), no_workers) as coordinator,
        aiohttp.ClientSession() as session,
    ):
        headers = {"Authorization": f"Bearer {coordinator.ready.token_file.read_text().strip()}"}
        address = coordinator.ready.url + routes.SUBMISSIONS.address()
        async with session.get(f"{address}?limt=3", headers=headers) as answer:
            assert answer.status == 400
            message = (await answer.json())["error"]["message"]
        names = "`after`, `branch`, `label`, `limit`, `owner`, `pull`, `state`, `tag`, `within`"
        assert message == f"there is no parameter 'limt' here; those of this address: {names}."
        async with session.get(coordinator.ready.url + routes.OPENAPI.address()) as answer:
            found = await answer.json()
    assert found["openapi"] == "3.1.1"
    assert {operation["operationId"] for path in found["paths"].values() for operation in path.values()} == {
        name.lower() for table in TABLES for name, route in vars(table).items() if isinstance(route, Route)
    }
    assert all(operation["summary"] for path in found["paths"].values() for operation in path.values())
