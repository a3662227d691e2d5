"""The wire between coordinator and agents: messages, reasons, grades, the port of a fleet and its polling.

Both sides import it. It starts no process and touches no store.
"""
