"""Planning runs before they are started, from formulas and from measured runs."""
