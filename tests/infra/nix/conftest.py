"""Property tests here have no deadline: the machine that runs them is shared, and the properties are about bytes."""

from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
