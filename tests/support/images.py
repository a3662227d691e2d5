"""The container images of this checkout, built once for all tests that run them."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

from tests.support.pods import Image, run
from tests.support.units import DEPLOY

BUILD: Final = DEPLOY / "images" / "build"
#: Survives a run of the tests, since the base takes most of the time.
PLACE: Final = Path(sys.prefix) / "images"
TAG: Final = "test"
_BUILD_WITHIN_S: Final = 600.0


def build() -> dict[str, str]:
    """Build both images; return the digest of the manifest of each."""
    PLACE.mkdir(exist_ok=True)
    with (PLACE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ran = subprocess.run(
            [BUILD, TAG], env={**os.environ, "IMAGES": str(PLACE)}, timeout=_BUILD_WITHIN_S,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return {name.partition(":")[0]: digest for name, digest in (line.split() for line in ran.stdout.splitlines())}


@cache
def built() -> dict[str, str]:
    """Return the digests of the images, which are built where they have not been."""
    return build()


def buildah(*arguments: str) -> str:
    """Run buildah on the images' storage."""
    driver = os.environ.get("STORAGE_DRIVER", "overlay")
    storage = ("--root", PLACE / "storage", "--runroot", PLACE / "run", "--storage-driver", driver)
    return run("buildah", *storage, *arguments).strip()


def configuration(name: str) -> dict[str, Any]:
    """Return what an image says of itself: the OCI's image configuration."""
    found: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", f"{name}:{TAG}"))["OCIv1"]
    return found


@contextmanager
def mounted(*names: str) -> Iterator[dict[str, Image]]:
    """Mount images, only to be read; return them by name."""
    built()
    with ExitStack() as stack:
        images = {}
        for name in names:
            container = buildah("from", "--pull-never", f"localhost/{name}:{TAG}")
            stack.callback(buildah, "rm", container)
            root = Path(buildah("mount", container))
            stack.callback(buildah, "umount", container)
            config = configuration(name)["config"]
            images[name] = Image(root, tuple(config.get("Env", ())), config.get("User", ""))
        yield images
