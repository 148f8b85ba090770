"""Commands of `nextpt`: one module each, with a function `register(app)`."""
