"""What both trainers share: run, checkpoint, optim, schedule, log, utilisation, plot."""
