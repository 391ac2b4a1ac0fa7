"""The sampling job: from classes to images, in chunks that a killed run resumes."""
