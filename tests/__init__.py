"""The test suite; what several files of it share is imported from here."""
