"""vhost-user for any kind of device: messages, sessions, and a front-end that reconnects."""
