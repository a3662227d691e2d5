"""Intake: a client's derivations and sources are verified, planned as steps and submitted to the engine."""
