"""The reference of all settings is what the models say."""

from __future__ import annotations

from tests.architecture.settings_reference import FILE, reference


def test_the_reference_of_settings_is_printed_from_the_models() -> None:
    assert FILE.read_text() == reference(), "run `./run docs`"
