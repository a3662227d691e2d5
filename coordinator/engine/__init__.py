"""The engine: events in, facts to the journal, effects out to workers and cache; and what feeds and prunes it."""
