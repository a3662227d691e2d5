"""The client: evaluation, the closure in the local store, and calls of the API (`coordinator.api`)."""
