"""The recipe of the carried copy detector."""
