"""Starts machines, and ends them when everything is delivered."""
