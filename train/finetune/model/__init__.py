"""What is trained and towards what: the model, the forward process, the loss."""
