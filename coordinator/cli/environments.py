"""Commands of `drover environments …` and `drover coverage`: one question to the coordinator, one answer printed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from coordinator.api.environments import (
    CoverageView,
    EnvironmentView,
    GapView,
    RevisionView,
    SystemCoverageView,
    TrendView,
)
from coordinator.api.requests import PushSubmissionRequest, RollbackRequest, TrackRequest
from coordinator.cli import exit_status
from coordinator.cli.printing import print_json, print_lines
from coordinator.cli.rendering import counted, duration, one_line, table_lines
from coordinator.client.api_client import ApiClient
from infra.records import record

#: Revisions and gaps that are listed; `--json` has all that the coordinator returns.
LISTED: Final = 20
#: Characters of a mark, enough for a commit.
_MARK: Final = 12
_DAY_S: Final = 86_400.0


@record(frozen=True, slots=True)
class TrackOptions:
    """The options of `track`."""

    pushed: bool
    path: str
    url_of_git: str
    ref: str
    file: str
    system: str
    owners: tuple[str, ...]

    def request(self) -> TrackRequest:
        """Return them as the API takes them."""
        kind: Literal["push", "file", "git"] = "git" if self.url_of_git else "file" if self.path else "push"
        return TrackRequest.model_validate(
            {
                "kind": kind,
                "path": self.file if self.url_of_git else self.path,
                "url": self.url_of_git,
                "ref": self.ref,
                "system": self.system,
                "owners": self.owners,
            }
        )


async def listing(client: ApiClient, *, as_json: bool) -> int:
    """List environments."""
    found = await client.environments()
    if as_json:
        print_json({"environments": found})
    elif found:
        print_lines(table_lines(_rows(found, time.time())))
    else:
        print_lines(["no environment is tracked; begin with `drover environments track NAME`"])
    return exit_status.OK


def _rows(found: Sequence[EnvironmentView], now: float) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("name", "source", "revision", "stable", "looked at")]
    for each in found:
        newest = str(each.revisions[0].number) if each.revisions else "none yet"
        stable = ", ".join(f"{one.system} {one.revision}" for one in each.stable if one.revision) or "nowhere"
        looked = f"{duration(max(0.0, now - each.looked_at))} ago" if each.looked_at else "never"
        rows.append((each.name, place(each), newest, stable, f"{looked}: {each.trouble}" if each.trouble else looked))
    return rows


def place(environment: EnvironmentView) -> str:
    """Return where an environment comes from."""
    if environment.kind == "git":
        file = f" ({environment.path})" if environment.path else ""
        return f"{environment.url}{f' at {environment.ref}' if environment.ref else ''}{file}"
    return environment.path if environment.kind == "file" else "pushed"


async def show(client: ApiClient, name: str, *, as_json: bool) -> int:
    """Show an environment."""
    return _shown(await client.environment(name), as_json=as_json)


async def track(client: ApiClient, name: str, source: TrackOptions, *, as_json: bool) -> int:
    """Track an environment."""
    return _shown(await client.track(name, source.request()), as_json=as_json)


async def push(
    client: ApiClient, name: str, file: Path | None, *, submission: str, system: str, mark: str, as_json: bool
) -> int:
    """Send a content."""
    if file is None:
        found = await client.push_submission(name, PushSubmissionRequest(submission=submission, mark=mark))
    else:
        data = await asyncio.to_thread(file.read_bytes)
        given = {"file": file.name, "system": system, "mark": mark}
        found = await client.push_content(name, data, {key: value for key, value in given.items() if value})
    return _shown(found, as_json=as_json)


async def look(client: ApiClient, name: str, *, as_json: bool) -> int:
    """Have a source looked at."""
    return _shown(await client.look(name), as_json=as_json)


async def rollback(client: ApiClient, name: str, systems: Sequence[str], to: int, *, as_json: bool) -> int:
    """Move pointers back."""
    return _shown(await client.roll_back(name, RollbackRequest(systems=tuple(systems), to=to)), as_json=as_json)


async def forget(client: ApiClient, name: str) -> int:
    """Forget an environment."""
    await client.forget_environment(name)
    print_lines([f"{name} is forgotten; the next collections may take what only it kept"])
    return exit_status.OK


def _shown(view: EnvironmentView, *, as_json: bool) -> int:
    if as_json:
        print_json(view)
    else:
        print_lines(environment_lines(view, time.time()))
    return exit_status.OK


def environment_lines(view: EnvironmentView, now: float) -> list[str]:
    """Return an environment for people."""
    lines = [f"{view.name}  {place(view)}  owned by {', '.join(view.owners) or 'the operator'}"]
    if view.trouble:
        since = duration(max(0.0, now - view.trouble_since))
        lines.append(f"for {since} its source cannot be read: {one_line(view.trouble)}")
    for pointer in view.stable:
        if pointer.revision:
            held = f", held until one is newer than {pointer.held_through}" if pointer.held_through else ""
            since = duration(max(0.0, now - pointer.moved_at))
            lines.append(f"stable  {pointer.system}: revision {pointer.revision} for {since}{held}")
    unstable = {system for each in view.revisions[:1] for system in each.packages}
    unstable -= {each.system for each in view.stable if each.revision}
    lines += [f"stable  {system}: nowhere yet; `drover coverage {view.name}` says why" for system in sorted(unstable)]
    if view.revisions:
        lines += table_lines([("revision", "came", "mark", "packages", ""), *_revisions(view.revisions[:LISTED], now)])
    else:
        lines.append(f"it has no revision yet; send one with `drover environments push {view.name}`")
    if len(view.revisions) > LISTED:
        lines.append(f"and {len(view.revisions) - LISTED} older; --json lists all")
    return lines


def _revisions(revisions: Sequence[RevisionView], now: float) -> list[tuple[str, ...]]:
    return [
        (
            str(each.number),
            f"{duration(max(0.0, now - each.created_at))} ago",
            each.mark[:_MARK],
            ", ".join(f"{count} {system}" for system, count in sorted(each.packages.items())),
            one_line(each.note),
        )
        for each in revisions
    ]


async def coverage(client: ApiClient, name: str | None, *, as_json: bool) -> int:
    """Show coverage."""
    found = await client.coverages() if name is None else [await client.coverage(name)]
    if as_json:
        print_json(found[0] if name is not None else {"environments": found})
        return exit_status.OK
    now = time.time()
    lines: list[str] = []
    for each in found:
        lines += [*([""] if lines else []), *coverage_lines(each, now)]
    print_lines(lines or ["no environment is tracked; begin with `drover environments track NAME`"])
    return exit_status.OK


def coverage_lines(view: CoverageView, now: float) -> list[str]:
    """Return the coverage of an environment for people."""
    if not view.assessed_at:
        return [f"{view.environment}  not looked at yet"]
    ago = duration(max(0.0, now - view.assessed_at))
    lines = [f"{view.environment}  revision {view.revision}, looked at {ago} ago"]
    head = ("system", "packages", "from here", "upstream", "built locally", "impossible", "stable", "oldest gap")
    lines += table_lines([head, *(_system_row(each, now) for each in view.systems)])
    lines += [line for each in view.systems if (line := trend_line(each.system, each.trend))]
    if view.gaps:
        rows = [("gap", "system", "for", "why"), *(_gap_row(gap, now) for gap in view.gaps[:LISTED])]
        lines += table_lines(rows)
    if view.gap_count > len(view.gaps[:LISTED]):
        lines.append(f"and {view.gap_count - len(view.gaps[:LISTED]):,} more; --json lists them")
    return lines


def _system_row(each: SystemCoverageView, now: float) -> tuple[str, ...]:
    ways = [(each.here, each.here_percent), (each.upstream, each.upstream_percent)]
    ways += [(each.local, each.local_percent), (each.impossible, each.impossible_percent)]
    gap = duration(max(0.0, now - each.oldest_gap_at)) if each.oldest_gap_at else "none"
    stable = str(each.stable) if each.stable else "nowhere"
    return (each.system, str(each.packages), *(f"{percent:g} % ({count})" for count, percent in ways), stable, gap)


def trend_line(system: str, trend: Sequence[TrendView]) -> str:
    """Return how coverage was at the ends of weeks, the last one now; "" while there is one week alone."""
    if len(trend) < 2:
        return ""
    weeks = round((trend[-1].day_at - trend[0].day_at) / _DAY_S / 7)
    figures = ", ".join(f"{each.fetched:g} %" for each in trend[-8:])
    return f"{system}  fetched over {counted(max(1, weeks), 'week')}: {figures}"


def _gap_row(gap: GapView, now: float) -> tuple[str, ...]:
    since = duration(max(0.0, now - gap.since))
    return gap.package, gap.system, since, f"{gap.reason}: {one_line(gap.detail)}" if gap.detail else gap.reason
