"""Sandbox of one program that is not trusted: namespaces, limits and a filter of system calls."""
