"""Training data: files of conversations to arrays."""
