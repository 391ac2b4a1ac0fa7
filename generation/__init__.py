"""The sampling job: classes or stored codes in, images out, in chunks that a later run resumes."""
