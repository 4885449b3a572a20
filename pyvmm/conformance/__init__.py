"""A virtio-net driver without a guest, and checks of vhost-user back-ends by means of it."""
