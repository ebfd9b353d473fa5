"""Recipes that reproduce published figures: the training code of the package, the settings and the paper's number."""
