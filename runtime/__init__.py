"""What every program stands on: errors, whole files, processes, signals, randomness, parts."""
