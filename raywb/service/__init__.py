"""The actor's side: ingest → ledger → merge → outbox → sinks."""
