"""The quickstart's own programs: digits, report, completion, edits, reference curves."""
