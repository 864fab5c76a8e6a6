"""What jobs are given: files of prompts, and the carried sample set."""
