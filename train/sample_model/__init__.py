"""Recipes of the small models that are carried along."""
