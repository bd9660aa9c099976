"""The ports of a pump: a file a port, none imports another."""
