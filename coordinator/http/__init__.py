"""The coordinator's HTTP side: the JSON API and the binary cache."""
