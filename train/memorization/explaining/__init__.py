"""``train explain``: the words that a prompt's memorization hangs on."""
