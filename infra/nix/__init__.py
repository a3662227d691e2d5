"""Nix formats as pure functions: no I/O, no clock, no framework; the store directory is an argument."""
