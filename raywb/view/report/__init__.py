"""``raywb report``: a run as one HTML file, and as PNGs, to attach to a ticket.

The file is the page that ``raywb ui`` shows, with scripts, styles and data in it: it opens without
a network, a server or raywb.
"""
