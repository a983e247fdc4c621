"""Does a model attend to the question when a wrapper stands around it? Measured in bulk, and trained for."""
