"""The encoding job: images in, a token cache out, in parts that a later run resumes."""
