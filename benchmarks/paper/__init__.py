"""What a GPU would do, worked out on a machine without one: generated code, bytes, instructions."""
