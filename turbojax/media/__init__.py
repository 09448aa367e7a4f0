"""Pictures and videos: read, written and checked."""
