"""Signals of memorization: the protocol, their names, and a file for each."""
