"""What a curation leaves beside the shards: the ledger and the report."""
