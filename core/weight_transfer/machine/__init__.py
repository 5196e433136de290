"""What this machine is like, as far as weights that travel are concerned; checks of it for plugins.

Nothing here needs torch before it is called.
"""
