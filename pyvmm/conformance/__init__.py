"""A driver without a guest, and what it checks of vhost-user back-ends."""
