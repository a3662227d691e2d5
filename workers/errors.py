"""The exception root of the worker program."""


class WorkerError(Exception):
    """Root of every error that `workers` raises on purpose; the text is one sentence for people."""
