"""What a stage holds: bytes on a device, on a host and on disk."""
