"""The agent of one worker: leases, inputs, builds, outputs, isolation and health of its machine. No transport."""
