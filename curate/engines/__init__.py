"""Where the stages of a curation run."""
