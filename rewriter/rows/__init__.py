"""Rows of a padded batch that nobody reads: proof that the others do not depend on them, and layers without them."""
