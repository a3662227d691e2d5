"""Recipes that the installed Nix refuses: each ends as its own fault, and the worker stays fit and in one piece."""

from __future__ import annotations

from infra.nix.derivation import Derivation
from workers.agent.refusals import recognise, signature
from workers.wire.messages import Failed, Succeeded

from .conftest import AgentHarness, drv, order

#: Name, script, environment, outputs, class, words of Nix's.
PROVOKED: tuple[tuple[str, str, dict[str, str], tuple[str, ...], str, str], ...] = (
    ("fifo", "mkfifo $out", {}, ("out",), "output_rejected", "unsupported type"),
    ("nested-fifo", "mkdir $out; mkfifo $out/pipe", {}, ("out",), "output_rejected", "unsupported type"),
    ("no-chroot", ": > $out", {"__noChroot": "1"}, ("out",), "permanent", "__noChroot"),
    ("impure", ": > $out", {"__impureHostDeps": "/etc/passwd"}, ("out",), "permanent", "impure path"),
    ("odd-graph", ": > $out", {"exportReferencesGraph": "graph"}, ("out",), "permanent", "odd number of tokens"),
    ("bad-graph-name", ": > $out", {"exportReferencesGraph": "a/b /etc"}, ("out",), "permanent", "invalid file name"),
    ("graph-outside", ": > $out", {"exportReferencesGraph": "graph /etc"}, ("out",), "permanent", "/etc"),
    ("json-list", ": > $out", {"__json": "[1]"}, ("out",), "permanent", "json.exception"),
    ("json-broken", ": > $out", {"__json": "{"}, ("out",), "permanent", "__json"),
    ("cycle", "echo $dev > $out; echo $out > $dev", {}, ("out", "dev"), "output_rejected", "cycle detected"),
    ("nothing", ":", {}, ("out",), "output_rejected", "failed to produce output path"),
    ("bad-reference", ": > $out", {"allowedReferences": "nonsense"}, ("out",), "permanent", "reference specifier"),
    ("own-reference", "echo $out > $out", {"allowedReferences": ""}, ("out",), "permanent", "not allowed to refer"),
)

#: What 2.34.8 says in other words than 2.8, and its class.
RECIPE_REFUSALS_OF_2_34 = {
    "error:\n       … while parsing derivation '/nix/store/z-graph.drv'\n\n"
    "       error: path '/etc' is not in the Nix store": "permanent",
    "error:\n       … while parsing derivation '/nix/store/s-graph.drv'\n\n"
    "       error: odd number of tokens in 'exportReferencesGraph': 'graph'": "permanent",
    "cannot process __json attribute: [json.exception.type_error.302] type must be object, but is array": "permanent",
    "derivation '/nix/store/p-x.drv' output check for 'out' contains output name 'nonsense', but this is not a valid "
    "output of this derivation. (Valid outputs are [out].)": "permanent",
}


async def test_each_refusal_that_can_be_provoked_is_the_recipes_own_fault_at_once(bench: AgentHarness) -> None:
    reader = await bench.agent(trial_every_s=86_400)
    orders = {name: order(drv(name, script, outputs=outputs, env=env)) for name, script, env, outputs, _, _ in PROVOKED}
    odd_builder = drv("odd-builder", "")
    orders["odd-builder"] = order((odd_builder[0], _replaced(odd_builder[1], builder="builtin:nonsense")))
    good = order(drv("good", "echo good > $out"))
    *_, last = await reader.build(*orders.values(), good)
    wrong: dict[str, object] = {}
    for name, _, _, _, reason, words in (*PROVOKED, ("odd-builder", "", {}, (), "permanent", "builtin builder")):
        result = reader.reports[orders[name].step].result
        if (
            not isinstance(result, Failed)
            or result.reason not in (reason, "output_rejected")
            or words not in result.message
        ):
            wrong[name] = result
    assert not wrong
    assert isinstance(last.result, Succeeded)
    assert not reader.batches[-1].unfit


async def test_a_refusal_that_is_not_known_has_one_signature_on_every_worker(bench: AgentHarness) -> None:
    """A system that the worker does not build for: a farm that sent it here is at fault, or the recipe is."""
    said: list[Failed] = []
    for name in ("one", "two"):
        reader = await bench.agent(name)
        [report] = await reader.build(order(drv("unsuited", ": > $out", system="m68k-linux")))
        assert isinstance(report.result, Failed)
        said.append(report.result)
    assert {failed.reason for failed in said} <= {"infrastructure", "daemon_lost"}
    assert said[0].signature
    assert said[0].signature == said[1].signature


def test_a_signature_forgets_what_differs_between_machines_and_keeps_what_differs_between_faults() -> None:
    one = "\x1b[31;1merror:\x1b[0m getting status of '/tmp/nix-build-a.drv-0/x': No such file (uid 30001)"
    two = "error: getting status of '/var/tmp/nix-build-a.drv-17/x':  No such file (uid 871)"
    assert signature(one) == signature(two)
    assert signature(one) != signature(one.replace("No such file", "Permission denied"))
    assert signature("") == ""


def test_sentences_of_later_versions_are_the_recipes_own_fault_too() -> None:
    """As 2.34.8 said them to a worker of this farm; the installed Nix has other words."""
    assert {text: recognise(text) for text in RECIPE_REFUSALS_OF_2_34} == RECIPE_REFUSALS_OF_2_34


def test_words_about_the_machine_are_not_taken_for_the_recipes() -> None:
    for words in (
        "error: creating directory '/nix/store': Permission denied",
        "error: unable to fork: Cannot allocate memory",
        "error: cannot set host name: Operation not permitted",
        "error: path '/nix/store/x' is not valid",
        "error: all build users are currently in use",
    ):
        assert recognise(words) is None


def _replaced(made: Derivation, **fields: str) -> Derivation:
    return Derivation(**{name: getattr(made, name) for name in Derivation.__dataclass_fields__} | fields)
