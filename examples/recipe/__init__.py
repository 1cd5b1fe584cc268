"""What the training scripts beside this folder share."""
