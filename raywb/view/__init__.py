"""What a person sees of a run: the terminal for now."""
