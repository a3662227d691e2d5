"""The client's side of binary caches: the question about a closure."""
