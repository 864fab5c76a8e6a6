"""Decisions: near pairs → who is kept, and who stands for whom; lists of samples to leave out."""
