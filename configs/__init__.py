"""The options of the programs: their schema, how they are read and shown, and YAML presets."""
