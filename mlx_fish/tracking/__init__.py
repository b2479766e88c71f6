"""Follow a run: one stream of events, and the sinks that take them (terminal, JSON log, loss curve)."""
