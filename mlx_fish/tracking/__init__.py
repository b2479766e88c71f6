"""Report the progress of a run: a stream of events and its sinks (terminal, JSON log, loss curve)."""
