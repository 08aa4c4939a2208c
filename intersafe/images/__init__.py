"""Images: read and verify untrusted image files, and store them by content."""
