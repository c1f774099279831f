"""A method and an objective for fedforward, in a package of their own."""
