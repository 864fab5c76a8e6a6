"""``train detect``: prompts scored, and how well the scores tell memorized ones from others."""
