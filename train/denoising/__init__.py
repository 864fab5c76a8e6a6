"""The model behind one protocol: loading, conditioning, the denoiser call, predictions, schedules, decoding."""
