"""Bodies that a client makes are the models that the coordinator takes."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from typing import Any

import orjson
import pytest

from coordinator.api import requests
from coordinator.api.root_limits import RootLimits
from coordinator.client import bodies

STAGE = bodies.StageBody(name="closure", begin=1.5, end=2.0)
ROOT = bodies.RootBody(attr="a", drv="/nix/store/x.drv", outputs=("out",), limits=RootLimits(timeout_s=5))
FULL = (
    (requests.RootRequest, ROOT),
    (requests.ClientStage, STAGE),
    (requests.SubmitRequest, bodies.SubmitBody(roots=(ROOT,), makers=("/m.drv",), stages=(STAGE,), tags={"a": "b"})),
    (requests.GrowRequest, bodies.GrowBody(roots=(ROOT,), makers=("/m.drv",), retry_failed=True, client="c")),
    (requests.UnevaluatedAttr, bodies.UnevaluatedBody(attr="a", message="m")),
    (requests.SealRequest, bodies.SealBody(not_evaluated=(bodies.UnevaluatedBody(attr="a"),), drv_count=3)),
    (requests.IntakeQuery, bodies.MembersBody(store_dir="/nix/store", derivations=("a",), sources=("b",))),
)


@pytest.mark.parametrize(("model", "body"), FULL, ids=lambda each: getattr(each, "__name__", ""))
def test_a_body_has_the_fields_and_defaults_of_its_model_and_is_taken(model: Any, body: Any) -> None:
    assert f"`{model.__name__}`." == type(body).__doc__
    own = {each.name: each for each in fields(body)}
    assert own.keys() == model.model_fields.keys()
    for name, each in own.items():
        its = model.model_fields[name]
        has_default = each.default is not MISSING or each.default_factory is not MISSING
        assert has_default is not its.is_required(), name
        if has_default:
            default = each.default_factory() if each.default_factory is not MISSING else each.default
            assert default == its.get_default(call_default_factory=True), name
    assert orjson.loads(orjson.dumps(model.model_validate_json(orjson.dumps(body)).model_dump())) == orjson.loads(
        orjson.dumps(asdict(body))
    )
