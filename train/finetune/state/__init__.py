"""What a run carries from step to step: checkpoints, average, optimizer, log; stopping, memory, spreading."""
