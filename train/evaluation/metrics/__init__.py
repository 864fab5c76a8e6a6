"""Metrics of drawn images behind one protocol: judges of copies, alignment, quality; a file a metric."""
