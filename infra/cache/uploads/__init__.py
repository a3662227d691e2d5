"""Uploads over HTTP, the coordinator's side: sessions, relayed pieces, presigned addresses of S3."""
