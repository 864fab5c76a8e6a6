"""``train app``: a page over a model, a curation and a folder of runs, to look at them and to try what changes."""
