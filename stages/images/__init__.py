"""From picture files to batches of tensors."""
