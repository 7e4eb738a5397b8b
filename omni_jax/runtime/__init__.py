"""Generation: what runs the networks for requests."""
