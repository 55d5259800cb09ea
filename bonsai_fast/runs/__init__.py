"""Run directories: identity, ledger, masks; how a run is resumed."""
