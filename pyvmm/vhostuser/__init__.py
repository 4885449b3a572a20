"""vhost-user: messages on their socket."""
