"""The devices that ship with vq: one file a device type."""
