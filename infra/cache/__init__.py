"""The signed binary cache: objects, metadata, publishing and reading."""
