"""The journal: durable facts, their codec, and the leadership of the one coordinator that writes."""
