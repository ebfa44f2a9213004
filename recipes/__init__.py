"""Recipes: whole jobs on Ray that raywb observes, each started with ``python -m recipes.NAME``."""
