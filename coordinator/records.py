"""Records of `infra.records`, under the name that the coordinator's rooms import."""

from infra.records import record

__all__ = ["record"]
