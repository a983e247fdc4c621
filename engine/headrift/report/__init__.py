"""One HTML page about finished runs: what separates, what does not, and where to look."""
