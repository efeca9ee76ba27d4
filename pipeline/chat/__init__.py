"""A conversation with a model: the request, the terminal, and how answers look there."""
