"""The sampling job: classes or stored codes to images, in chunks that a later run resumes."""
