"""The documentation: the site (``make docs``) and the man pages (``make man``)."""
