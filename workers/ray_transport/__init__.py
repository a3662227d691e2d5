"""Ray as the transport: nodes, their records, the agent actors on them, and the fleet over both."""
