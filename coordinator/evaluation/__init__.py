"""Evaluation of Nix files: what can be built of them, found by a pool of evaluator processes."""
