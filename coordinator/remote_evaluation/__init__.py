"""Remote evaluation: on the coordinator's machine, in a sandboxed process whose word is a stranger's."""
