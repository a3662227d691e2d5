"""The `drover` command: a module for each group of commands; `commands` has their words and imports the rest late."""

from coordinator.cli.commands import main

__all__ = ["main"]
