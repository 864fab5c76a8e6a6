"""Opening a model: its files looked at, loaded or refused, with attention and adapters set up."""
