"""The web page: what it is served with, and the page itself in ``static/``."""
