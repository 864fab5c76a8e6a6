"""The model behind one protocol: conditioning, predictions in every space, noise schedule; families fill it."""
