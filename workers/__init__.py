"""The worker program, its wire protocol and the fleet adapters."""
