"""The memorization filter: which samples of a batch count, by which evidence and thresholds."""
