"""`drover cache …`: the words of the commands; what they do is in `coordinator.cli.cache` and `cache_push`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from coordinator.cli.options import Bytes, addressed, run_with_client

_Command = TypeVar("_Command", bound=Callable[..., Any])


@click.group()
def cache() -> None:
    """Look after a binary cache: contents, roots, pins, checks."""


def cached(command: _Command) -> _Command:
    """Add the options of every command on a cache: which one, the form of the answer, where the coordinator is."""
    name = click.option("--cache", "name", default="default", show_default=True, help="Name of the cache.")
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    return name(as_json(addressed(command)))


@cache.command()
@cached
def info(*, url: str, token_file: str, name: str, as_json: bool) -> int:
    """Say what is stored, kept, and saved by deduplication."""
    from coordinator.cli import cache as caching  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: caching.info(client, name, as_json=as_json))


@cache.command()
@cached
def roots(*, url: str, token_file: str, name: str, as_json: bool) -> int:
    """List what is kept, and until when: pins, submissions, pushes."""
    from coordinator.cli import cache as caching  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: caching.roots(client, name, as_json=as_json))


@cache.command()
@click.argument("path")
@cached
def why(*, url: str, token_file: str, name: str, as_json: bool, path: str) -> int:
    """Say which roots keep PATH (a store path, or its base name), and through which references."""
    from coordinator.cli import cache as caching  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: caching.why(client, name, path, as_json=as_json))


@cache.command()
@click.argument("pin")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="Keep for so many days; default: for ever.")
@cached
def pin(
    *, url: str, token_file: str, name: str, as_json: bool, pin: str, paths: tuple[str, ...], days: float | None
) -> int:
    """Keep PATHs, and all that they refer to, under the name PIN; the same name again replaces it."""
    from coordinator.cli import cache as caching  # noqa: PLC0415 - slow to import

    return run_with_client(
        url, token_file, lambda client: caching.pin(client, name, pin, paths, days=days, as_json=as_json)
    )


@cache.command()
@click.argument("pin")
@cached
def unpin(*, url: str, token_file: str, name: str, as_json: bool, pin: str) -> int:
    """Forget a pin; the next collections may take what only it kept."""
    from coordinator.cli import cache as caching  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: caching.unpin(client, name, pin, as_json=as_json))


@cache.command()
@click.option("--dry-run", is_flag=True, help="Change nothing; say what would be done.")
@cached
def gc(*, url: str, token_file: str, name: str, as_json: bool, dry_run: bool) -> int:
    """Collect what no root keeps: first made invisible, deleted after a grace."""
    from coordinator.cli import cache as caching  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: caching.gc(client, name, dry_run=dry_run, as_json=as_json))


@cache.command()
@click.option("--full", is_flag=True, help="Read every object and check every hash, not sizes alone.")
@click.option("--repair", is_flag=True, help="Fetch again what is broken; hide what cannot be had.")
@cached
def verify(*, url: str, token_file: str, name: str, as_json: bool, full: bool, repair: bool) -> int:
    """Prove that every narinfo leads to its NAR and its references; status 1 if something stays broken."""
    from coordinator.cli import cache as caching  # noqa: PLC0415 - slow to import

    return run_with_client(
        url, token_file, lambda client: caching.verify(client, name, full=full, repair=repair, as_json=as_json)
    )


@cache.command()
@cached
def resign(*, url: str, token_file: str, name: str, as_json: bool) -> int:
    """Sign everything anew with the keys that the coordinator has now; NARs stay untouched."""
    from coordinator.cli import cache as caching  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: caching.resign(client, name, as_json=as_json))


@cache.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--store", metavar="DIR", help="Take the paths from a Nix store below DIR.")
@click.option("--keep-as", metavar="NAME", help="Name of the root that keeps them; the same name again replaces it.")
@click.option(
    "--days", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Keep so long; 0: for ever."
)
@cached
def push(*, url: str, token_file: str, name: str, as_json: bool, **options: Any) -> int:
    """Send store PATHs (or links to them, such as ./result) with all that they refer to.

    Wants a token that may write to the cache: the API token for the default one, else one of its writers'.
    """
    from coordinator.cli import cache_push  # noqa: PLC0415 - slow to import

    request = cache_push.PushRequest(url, token_file, name, as_json=as_json, **options)
    return cache_push.push(request)


@cache.command()
@click.option("--upstream", "upstreams", multiple=True, required=True, metavar="URL", help="Cache to ask; repeatable.")
@click.option("--port", type=click.IntRange(1, 65535), default=7879, show_default=True, help="Port to listen on.")
@click.option("--listen", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep narinfos and NARs there.  [default: ~/.cache/drover/proxy]",
)
@click.option("--max-size", type=Bytes(), default="10G", show_default=True, help="Keep so much, used last.")
@click.option("--netrc", metavar="FILE", help="Tokens of private caches.  [default: /etc/nix/netrc, if readable]")
def proxy(**options: Any) -> int:
    """Run a small cache on this machine that makes distant ones fast.

    It asks a farm for a whole closure at once, any other cache for many paths at one time, fetches NARs ahead of Nix
    and keeps them. Nix checks the signatures, as ever; the proxy has no key. It prints the line for nix.conf and runs
    until Ctrl-C.
    """
    from coordinator.cli import cache_proxy, short_life  # noqa: PLC0415 - slow to import

    short_life.stay()
    return cache_proxy.proxy(cache_proxy.settings_of(options))
