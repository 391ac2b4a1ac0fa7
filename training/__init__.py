"""What both trainers share around their steps: run, checkpoints, optimizer, schedule, log."""
