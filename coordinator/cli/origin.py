"""Origin of a submission: what its command says, and what the runner that starts the command sets.

| runner | commit | branch | pull | tags |
| --- | --- | --- | --- | --- |
| GitHub, Forgejo, Gitea | `GITHUB_SHA` | `GITHUB_HEAD_REF`, or of `GITHUB_REF` | of `GITHUB_REF` | see `_GITHUB_TAGS` |
| GitLab | `CI_COMMIT_SHA` | `CI_MERGE_REQUEST_SOURCE_BRANCH_NAME`, `CI_COMMIT_BRANCH` | `CI_MERGE_REQUEST_IID` | … |
| Buildkite | `BUILDKITE_COMMIT` | `BUILDKITE_BRANCH` | `BUILDKITE_PULL_REQUEST` | … |

What the command says wins. What an environment sets and the farm would refuse is left out: it is not the command's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from typing import Final

from coordinator.api.limits import MAX_BRANCH, MAX_COMMIT, MAX_PULL, MAX_TAG_KEY, MAX_TAG_VALUE, MAX_TAGS, TAG_KEY
from infra.records import record

_PULL_REF: Final = re.compile(r"refs/pull/([^/]+)/(?:head|merge)")
_BRANCH_REF: Final = "refs/heads/"
#: Tag -> variable of each runner.
_GITHUB_TAGS: Final = {
    "repository": "GITHUB_REPOSITORY",
    "workflow": "GITHUB_WORKFLOW",
    "job": "GITHUB_JOB",
    "run": "GITHUB_RUN_ID",
}
_GITLAB_TAGS: Final = {"repository": "CI_PROJECT_PATH", "job": "CI_JOB_NAME", "run": "CI_PIPELINE_ID"}
_BUILDKITE_TAGS: Final = {
    "repository": "BUILDKITE_PIPELINE_SLUG",
    "job": "BUILDKITE_LABEL",
    "run": "BUILDKITE_BUILD_NUMBER",
}


class TagError(ValueError):
    """A text that is no tag."""


@record(frozen=True, slots=True)
class ClaimedOrigin:
    """Branch, pull request, commit and tags of a submission; "" where there is none."""

    branch: str = ""
    pull: str = ""
    commit: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    def over(self, below: ClaimedOrigin) -> ClaimedOrigin:
        """Return this origin with what it lacks taken from another; of tags as many as the farm takes."""
        tags = dict(self.tags)
        for key, value in below.tags.items():
            if len(tags) < MAX_TAGS:
                tags.setdefault(key, value)
        # A branch of the command's is not the one of the runner's pull request.
        named = bool(self.branch or self.pull)
        return ClaimedOrigin(
            branch=self.branch if named else below.branch,
            pull=self.pull if named else below.pull,
            commit=self.commit or below.commit,
            tags=tags,
        )


def origin_of(environment: Mapping[str, str]) -> ClaimedOrigin:
    """Return what the runner that started this program says; nothing where none did."""
    get = environment.get
    if get("GITHUB_ACTIONS") == "true" or get("FORGEJO_ACTIONS") == "true" or get("GITEA_ACTIONS") == "true":
        ref = get("GITHUB_REF", "")
        pull = _PULL_REF.fullmatch(ref)
        branch = get("GITHUB_HEAD_REF", "") or (ref.removeprefix(_BRANCH_REF) if ref.startswith(_BRANCH_REF) else "")
        return _taken(environment, branch, pull[1] if pull else "", get("GITHUB_SHA", ""), _GITHUB_TAGS)
    if get("GITLAB_CI"):
        branch = get("CI_MERGE_REQUEST_SOURCE_BRANCH_NAME", "") or get("CI_COMMIT_BRANCH", "")
        return _taken(environment, branch, get("CI_MERGE_REQUEST_IID", ""), get("CI_COMMIT_SHA", ""), _GITLAB_TAGS)
    if get("BUILDKITE") == "true":
        commit, pull_text = get("BUILDKITE_COMMIT", ""), get("BUILDKITE_PULL_REQUEST", "")
        return _taken(
            environment,
            get("BUILDKITE_BRANCH", ""),
            "" if pull_text == "false" else pull_text,
            "" if commit == "HEAD" else commit,
            _BUILDKITE_TAGS,
        )
    return ClaimedOrigin()


def parse_tags(words: tuple[str, ...]) -> dict[str, str]:
    """Return `KEY=VALUE` words as tags. Raises `TagError` with a sentence about the first that is none."""
    tags: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch(TAG_KEY, key) or len(key) > MAX_TAG_KEY:
            raise TagError(
                f"{word[:40]!r} is no tag: write KEY=VALUE, KEY of at most {MAX_TAG_KEY} letters, digits and ._/-"
            )
        if len(value) > MAX_TAG_VALUE or not value.isprintable():
            raise TagError(
                f"the value of the tag {key} has more than {MAX_TAG_VALUE} characters, or control characters"
            )
        if tags.setdefault(key, value) != value:
            raise TagError(f"the tag {key} is given twice with different values; a tag has one")
    if len(tags) > MAX_TAGS:
        raise TagError(f"{len(tags)} tags are given; a submission has at most {MAX_TAGS}")
    return tags


def _taken(
    environment: Mapping[str, str], branch: str, pull: str, commit: str, tags: Mapping[str, str]
) -> ClaimedOrigin:
    found = {tag: environment.get(name, "") for tag, name in tags.items()}
    return ClaimedOrigin(
        branch=_fitting(branch, MAX_BRANCH),
        pull=_fitting(pull, MAX_PULL),
        commit=_fitting(commit, MAX_COMMIT),
        tags={tag: value for tag, value in found.items() if _fitting(value, MAX_TAG_VALUE)},
    )


def _fitting(text: str, most: int) -> str:
    return text if len(text) <= most and text.isprintable() else ""
