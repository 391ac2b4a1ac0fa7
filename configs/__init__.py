"""YAML presets and the one schema they obey (`configs.schema`)."""
