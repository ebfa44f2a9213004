"""``raywb drain``: a machine is about to be taken away; bring off it what it holds, in time."""
