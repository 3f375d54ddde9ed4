"""What a device wants, and how to reach it."""
