"""What the loop is fed with: batches of images and their captions, streamed or from the caches."""
