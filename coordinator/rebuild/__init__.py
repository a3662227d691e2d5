"""Comparison of two evaluations and of what was built of them: pure; each rendering is a module of its own."""
