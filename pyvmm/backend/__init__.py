"""A vhost-user back-end of our own: the emulated data path behind a socket."""
