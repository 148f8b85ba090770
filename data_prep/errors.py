"""Mistakes in corpora and datasets that a person can mend."""


class PrepError(ValueError):
    """One line that names the file or key, what was expected, and the way out."""
